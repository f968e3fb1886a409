"""The planner held against measurements: constants, errors, and the tables and pictures of docs/planner.md."""
