"""Groups of ranks: how they open, which transport carries their bytes, how a lost rank is found."""
