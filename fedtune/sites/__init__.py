"""A site, simulated or real, below any transport: its files, its records and its part of a round."""
