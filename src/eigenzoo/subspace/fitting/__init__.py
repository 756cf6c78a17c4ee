"""Fitting a zoo: what was asked, ranks for a budget, and the tasks that make bases and coefficients."""
