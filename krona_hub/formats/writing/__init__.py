"""Write an adapter: module names, tensors, files, verification by reading back."""
