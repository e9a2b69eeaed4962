"""Studies of several runs: sweeps, searches and comparisons, with each run in its own folder."""
