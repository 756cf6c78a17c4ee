"""Fit a zoo: options, ranks for a budget, and the tasks that compute bases and coefficients."""
