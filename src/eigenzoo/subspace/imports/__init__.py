"""Other tools' subspaces, as bundles."""
