"""The supported formats, each a `Format` value."""
