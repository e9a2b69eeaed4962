"""Attacks on finished runs, by the names that checkers know, each beside what the guarantee allows it."""
