"""Federated algorithms, one module each with the site's half, the lead's half and the settings."""
