"""Images, captions and batches of a training run."""
