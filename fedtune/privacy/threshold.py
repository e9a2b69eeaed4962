"""The threshold of secure aggregation that prevents a server from unmasking two sums of one release."""

from __future__ import annotations

from fedtune.spec import ConfigError


def min_threshold(num_sites: int, *, colluders: int) -> int:
    """Compute the smallest threshold at which a server cannot unmask two survivor sets of one release.

    The server may be malicious. Unmasking two sets takes 2t confirmations. Each colluder confirms both sets and each
    other site one, K + c in total, so 2t > K + c prevents the second set from being confirmed.

    Args:
        num_sites: K, the number of sites in the run.
        colluders: c, the number of sites that share all their secrets with the server and follow its orders.

    Raises:
        ConfigError: no threshold withstands this many colluders.
    """
    least = (num_sites + colluders) // 2 + 1
    if least > num_sites:
        raise ConfigError("colluders", colluders, f"must be fewer than the {num_sites} sites of the run")
    return least
