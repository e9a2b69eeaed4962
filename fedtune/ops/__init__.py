"""Deployment to real sites: startup kits, the processes of server, site and lead, and the preflight checks."""
