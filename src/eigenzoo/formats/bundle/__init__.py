"""Our bundle: the folder, its manifest, bases, and what rebuilt models need besides."""
