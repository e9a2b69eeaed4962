"""A site, simulated or real, without its transport: its files, its records, and its part of a round."""
