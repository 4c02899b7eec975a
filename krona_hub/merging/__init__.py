"""Merge adapters into base weights: tile by tile, into files of the same layout."""
