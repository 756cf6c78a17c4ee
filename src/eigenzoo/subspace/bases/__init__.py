"""A fitted layer in each of its forms: what projects a model onto it and rebuilds one from it."""
