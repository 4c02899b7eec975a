"""Safetensors files with bounded memory: strict header parsing, lazy tensor reading, atomic writing."""
