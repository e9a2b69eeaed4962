"""Scores of a task model (`scoring`), by group (`groups`), with intervals (`bootstrap`); `spec` has the settings.

Texts that a model writes are scored as well (`generation`).
"""
