"""The mathematics of Kronecker sums, independent of files, layer names and alpha."""
