"""General utilities: errors, files, schemas, pytrees and processes."""
