"""How fast, and in how much memory, the engine and the families run on this machine.

  python -m experiments.benchmark --output=benchmark.json

The command line is in `__main__.py`, the rows on the engine in `engine.py`, the row on the
families in `models.py`.
"""
