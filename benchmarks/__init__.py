"""Benchmarks of the fusion, the vision side and a training step: ``python -m benchmarks --help``."""
