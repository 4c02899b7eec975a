"""Pure mathematics of Kronecker sums: knows no files, no layer names, no alpha."""
