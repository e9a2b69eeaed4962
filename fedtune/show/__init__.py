"""Rendering of tables, charts, amounts and text, shared by terminal and reports."""
