"""Measurements, run as ``python -m benchmarks.codec``, ``.growth`` and ``.start``; never tests."""
