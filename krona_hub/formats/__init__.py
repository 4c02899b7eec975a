"""Adapter file formats: parsing, reading, writing and compatibility. `known.registry.FORMATS` lists them."""
