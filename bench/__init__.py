"""Benchmarks, the source of every number in README: see `python -m bench.run --help`."""
