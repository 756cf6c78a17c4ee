"""Forms of a fitted layer. Each projects models onto the layer's basis and rebuilds models from it."""
