"""Files that people exchange before a federation runs: certificates, kits, requests to join, the roster, models."""
