"""Data shipped in the package: found with importlib.resources, never by path."""
