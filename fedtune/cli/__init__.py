"""The `fedtune` command line: one module per command, and helpers that the commands share."""
