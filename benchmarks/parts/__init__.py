"""The parts of ``python -m benchmarks``.

Each module has ``MEASURES``, the text of what it measures on a GPU, and ``run_part(context)``.
"""
