"""One file or folder per on-disk format: readers that look at headers first, and writers that the formats' own libraries read."""
