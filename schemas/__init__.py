"""The published JSON Schemas, one frozen file per version."""
