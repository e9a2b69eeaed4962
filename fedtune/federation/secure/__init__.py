"""A sum of the sites' vectors of which the lead learns the sum alone; docs/secure_aggregation.md has the proof."""
