"""The state of a training: steps, checkpoints, samples, metrics."""
