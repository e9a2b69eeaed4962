"""Scores of a task model (`evaluate`) and of the texts that it writes (`generation`); `spec` has the settings."""
