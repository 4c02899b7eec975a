"""The in-memory adapter: its layers and its provenance."""
