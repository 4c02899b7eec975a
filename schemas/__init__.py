"""The published JSON Schemas, frozen per version."""
