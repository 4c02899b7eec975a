"""Parameter accounting: what an adapter of given shapes and ranks costs, before any training."""
