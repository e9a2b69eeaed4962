"""A lead's records of its runs: results, environment, provenance, and comparisons of finished models."""
