"""Data pipeline: sources, TFDS builders, tokenization, packing and batch order."""
