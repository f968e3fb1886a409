"""Groups of ranks: how they open, which transport carries their bytes, how lost ranks are found."""
