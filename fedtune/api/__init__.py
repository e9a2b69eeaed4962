"""From a recipe and settings to a run: what the command line and `import fedtune` share."""
