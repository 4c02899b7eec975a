"""The trained model: families, noise processes, layers, optimizers and devices."""
