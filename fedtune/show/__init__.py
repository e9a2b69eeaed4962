"""Shared rendering of tables, charts, amounts and text lines, for the terminal and for pages."""
