"""An adapter in memory: its layers, and where it came from."""
