"""Hostile input for every reader and parser: a right result, or the documented error."""
