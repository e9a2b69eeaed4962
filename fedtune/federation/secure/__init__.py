"""Secure aggregation: the lead learns the sum of the sites' vectors and nothing else; docs/secure_aggregation.md has
the proof.
"""
