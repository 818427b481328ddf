"""Training, from settings to a finished run: inputs, step, loop, checkpoints, devices."""
