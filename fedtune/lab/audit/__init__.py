"""Experiments that attack the guarantee: what an attacker can show, beside what is claimed."""
