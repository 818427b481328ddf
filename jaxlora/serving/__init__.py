"""Trained task models: banks that store them, prediction, import and export."""
