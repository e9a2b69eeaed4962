"""Simulated and real sites, independent of the transport: their files, records, and local work in a round."""
