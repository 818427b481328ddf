"""The TFDS builder `sst_five`."""
