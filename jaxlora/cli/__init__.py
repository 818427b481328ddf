"""The commands; the only package whose messages name flags."""
