"""Base models: the module names and weight shapes of a family, and the names other tools give them. Torch-free."""
