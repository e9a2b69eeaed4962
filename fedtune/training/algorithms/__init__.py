"""Federated algorithms: one file each, with the site's half, the lead's half and the settings."""
