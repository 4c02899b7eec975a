"""Calibration: what the layers of a base model see and what its output feels, under an adapter."""
