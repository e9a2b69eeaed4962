"""Experiments that attack the guarantee: empirical lower bounds on epsilon, next to the claimed upper bounds."""
