"""The threshold of secure aggregation: how many sites must help, so that a server cannot unmask two sums of one
release.
"""

from __future__ import annotations

from fedtune.spec import ConfigError


def least_threshold(num_sites: int, *, colluders: int) -> int:
    """Return the smallest threshold at which no two sets of survivors of one release can both be unmasked.

    The server may be malicious.  Unmasking two sets takes 2t confirmations.  Each colluder confirms both sets and each
    other site one, K + c in all, so 2t > K + c keeps the second set from being confirmed.

    Args:
        num_sites: K, the number of sites in the run.
        colluders: c, the number of sites that tell the server everything and follow its orders.

    Raises:
        ConfigError: no threshold withstands this many colluders.
    """
    least = (num_sites + colluders) // 2 + 1
    if least > num_sites:
        raise ConfigError("colluders", colluders, f"must be fewer than the {num_sites} sites of the run")
    return least
