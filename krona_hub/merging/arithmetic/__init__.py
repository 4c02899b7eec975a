"""The arithmetic of a merge: weights plus deltas, rounded once."""
