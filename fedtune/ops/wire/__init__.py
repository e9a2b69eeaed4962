"""Between the processes: the federation's server, and a site's and the lead's connection to it.

All that relies on Flower's inside, which may change with each release, is here and in `fedtune.flower.simulation`;
tests/flower/test_internals.py says what that is.
"""
