"""The lead's side of a run: execution, results, environment, lineage, and comparisons of finished models."""
