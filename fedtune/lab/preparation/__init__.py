"""A data file before a run: detect its kind, write a first experiment for it, check and clean it; no run reads this."""
