"""From parameters and tokens to vectors and predictions: encoder, operations, heads."""
