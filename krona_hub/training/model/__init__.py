"""The model that is trained: families, noise processes, layers, optimizer, device."""
