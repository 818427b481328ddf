"""From settings to a trained run: inputs, step, loop, checkpoints, devices."""
