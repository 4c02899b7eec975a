"""The state and the intermediate outputs of a run: steps, checkpoints, samples and metrics."""
