"""Gradients of T tasks → one: what all methods share, on T×T numbers."""
