"""From files to batches: sources, TFDS builders, tokenising, packing, order."""
