"""Secure aggregation: the lead learns only the sum of the sites' vectors; docs/secure_aggregation.md has the proof."""
