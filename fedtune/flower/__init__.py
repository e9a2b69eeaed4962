"""The only layer that depends on Flower: apps, strategies, grids and the simulation."""

import os

# Flower sends usage telemetry unless it is disabled.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
