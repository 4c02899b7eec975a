"""Tiny scenes: captioned renders of one object on a table, and the models trained on them."""
