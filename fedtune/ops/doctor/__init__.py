"""Checks of `fedtune site doctor`: of the site's files, its machine and its connection to the server."""
