"""A lead's record of its runs: results, environment, provenance, finished models side by side."""
