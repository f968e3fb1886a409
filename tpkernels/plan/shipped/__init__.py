"""Plans of ours, one file for each `model_type` of transformers: RULES is {module glob: style}, or makes it."""
