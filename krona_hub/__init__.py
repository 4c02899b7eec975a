"""Krona Hub: read, convert, validate and account for Kronecker adapters of diffusion models."""

__version__ = "0.1.0"
