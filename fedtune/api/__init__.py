"""Composition of runs from recipes and overrides, shared by the command line and the Python API."""
