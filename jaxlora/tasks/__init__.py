"""Tasks as data: kinds, losses, metrics, and which tasks share parameters."""
