"""Checks for `fedtune site doctor`, one module per subject."""
