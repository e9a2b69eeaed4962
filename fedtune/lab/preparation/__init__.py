"""Preparation of a data file before a run: detect its kind, write a first experiment, check and clean it.

No run uses this package.
"""
