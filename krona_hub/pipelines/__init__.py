"""Opening a base model with diffusers, and loading adapters into it."""
