"""The factorization of a layer's delta, and its normal forms."""
