"""Rendering of tables, charts, privacy budgets and text for the terminal and for reports."""
