"""Interpret the keys, shapes, scales and names of an adapter file. Torch-free."""
