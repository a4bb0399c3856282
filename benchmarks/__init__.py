"""Figures, one JSON object each: python -m benchmarks.NAME."""
