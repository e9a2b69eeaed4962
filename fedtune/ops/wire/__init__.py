"""Network layer: the federation's server, and the clients with which sites and lead connect to it.

Flower's internals, which may change with each release, are used only here and in `fedtune.flower.internals`;
tests/flower/test_internals.py lists them.
"""
