"""The network layer: the federation's server, and the connections of sites and lead to the server.

Flower's internals, which may change with each release, are used only here and in `fedtune.flower.internals`;
tests/flower/test_internals.py lists them.
"""
