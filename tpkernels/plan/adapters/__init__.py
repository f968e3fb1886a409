"""Adapters of peft on a sharded model: sharded like the layers that they adapt, loaded from full files, or refused."""
