"""Tiny scenes: pictures of one object on a table, rendered with captions, and what is trained on them."""
