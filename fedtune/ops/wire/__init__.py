"""The network layer: the federation's server, and the connections of sites and lead to it.

All code that depends on Flower's internals, which may change with each release, is here and in
`fedtune.flower.simulation`; tests/flower/test_internals.py documents these internals.
"""
