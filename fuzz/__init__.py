"""Coverage-guided fuzzing of everything that eigenzoo reads: `python -m fuzz` (see docs/robustness.md)."""
