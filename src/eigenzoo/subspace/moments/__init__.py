"""Second moments of a layer's stack: collect them in one read, cache them, extend them, and detect copies."""
