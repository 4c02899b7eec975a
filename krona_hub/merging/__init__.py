"""Adapters into base weights: what is added to a stored tensor, tile by tile, and which files are written for that."""
