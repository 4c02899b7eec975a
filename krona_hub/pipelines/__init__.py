"""Diffusers pipelines: opening a base model, and loading adapters into it."""
