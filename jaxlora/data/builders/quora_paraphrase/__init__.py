"""The TFDS builder `quora_paraphrase`."""
