"""Base models: module names and weight shapes of each family, and their names in other applications. Torch-free."""
