"""The version, in a file that imports nothing: every layer may read it."""

__version__ = "0.2.0"
