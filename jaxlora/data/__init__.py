"""From files to batches: sources, TFDS builders, tokenization, packing and batch order."""
