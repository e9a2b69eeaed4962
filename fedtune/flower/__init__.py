"""The only layer that knows Flower: apps, strategies, grids, and the simulation."""
