"""Real deployment: startup kits, the processes of server, site and lead, and the checks before they start."""
