"""The privacy report of a run."""
