"""Task definitions: kinds, losses, metrics, and which tasks share parameters."""
