"""Adapters of peft on a cut model: cut like the layers that they adapt, loaded from whole files, refused otherwise."""
