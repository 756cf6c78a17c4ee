"""Second moments of a layer's stack: collected in one read, kept, grown, and looked at for copies."""
