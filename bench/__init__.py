"""Benchmarks: `python -m bench` (or `make bench`) prints what `bench/README.md` records."""
