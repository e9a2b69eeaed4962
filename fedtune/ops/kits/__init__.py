"""The files that are exchanged before a federation runs: certificates, kits, join requests, the roster, base models."""
