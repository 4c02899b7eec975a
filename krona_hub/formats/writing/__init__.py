"""From an adapter to a file: names, tensors, files, read back."""
