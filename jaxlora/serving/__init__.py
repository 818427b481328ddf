"""Trained task models: the bank that keeps them, prediction, export."""
