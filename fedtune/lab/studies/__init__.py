"""Several runs: a sweep, a search and a comparison, each run in a folder of its own."""
