"""Subspaces that other tools have written: read, and given as mean, directions and loadings."""
