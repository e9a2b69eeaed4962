"""`fedtune site doctor`: one file a subject of checks."""
