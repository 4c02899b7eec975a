"""The native file format across its versions."""
