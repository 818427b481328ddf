"""The TFDS builder `sts_benchmark`."""
