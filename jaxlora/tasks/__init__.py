"""What a task is, as data: kind, losses, metrics, and who shares what with whom."""
