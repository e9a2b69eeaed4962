"""Integration of Flower, which no other layer imports: apps, strategies, grids and the simulation."""

import os

# Flower sends usage telemetry unless it is disabled.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
