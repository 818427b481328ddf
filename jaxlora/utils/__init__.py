"""General utilities: errors, files, schemas, trees and processes."""
