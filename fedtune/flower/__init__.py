"""The only layer that depends on Flower: apps, strategies, grids, and the simulation."""

import os

# Flower reports usage to its makers unless told not to.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
