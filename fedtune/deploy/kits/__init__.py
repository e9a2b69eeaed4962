"""What people exchange before a federation runs: certificates, kits, requests to join, the roster, base models."""
