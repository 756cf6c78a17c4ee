"""Fit, project, rebuild, grow: the shared subspace of a zoo."""
