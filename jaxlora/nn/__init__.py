"""The networks: encoders, their operations, and task heads."""
