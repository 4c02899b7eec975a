"""Low-rank and Kronecker sums that are best under second moments of a layer's data, not in plain norm."""
