"""From a recipe and settings to a run: the code that the command line and the Python API share."""
