"""Files that lead, server and sites exchange before the first run: kits, certificates, join requests and the roster."""
