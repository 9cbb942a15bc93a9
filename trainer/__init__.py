"""The machine-learning half of Kangaroo: grow, train, compare. Runs by itself as `python -m trainer`."""

__version__ = "0.1.0"
