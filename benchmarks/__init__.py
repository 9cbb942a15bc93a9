"""What is measured, and how. `python -m benchmarks` lists the scripts; README.md holds the last figures."""
