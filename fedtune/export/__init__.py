"""Exports of a finished run's model in formats that load without fedtune."""
