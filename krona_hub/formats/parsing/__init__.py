"""What the keys, shapes, scales and names of an adapter file mean. Torch-free."""
