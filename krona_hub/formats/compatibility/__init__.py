"""Which formats can hold a delta, and which applications load a file. Torch-free."""
