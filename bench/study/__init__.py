"""The parts of examples/compression_study.py: methods, links, ranks, rows, table and picture."""
