"""Federated algorithms. Each module contains the site side, the lead side and the settings of an algorithm."""
