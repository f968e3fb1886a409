"""Benchmarks: every number in README comes from here. `python -m bench.run --help` says how."""
