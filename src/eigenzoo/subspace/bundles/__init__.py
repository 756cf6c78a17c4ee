"""A subspace as a bundle: its files, card and sources, saved, loaded, pushed and verified."""
