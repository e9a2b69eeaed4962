"""How many sites must help with a secure sum, so that a server cannot read two; sums and their noise go by it."""

from __future__ import annotations

from fedtune.spec import ConfigError


def least_threshold(num_sites: int, *, colluders: int) -> int:
    """Return the fewest sites that must help to unmask a release, so that no two sets of survivors can be unmasked.

    The server may do what it likes.  Two sets would need 2t confirmations.  Each colluder confirms both sets and each
    other site one, K + c in all, so 2t > K + c keeps the second set from being confirmed.

    Args:
        num_sites: K, of the run.
        colluders: c, sites that tell the server everything and do what it says.

    Raises:
        ConfigError: no number of these sites withstands as many colluders.
    """
    least = (num_sites + colluders) // 2 + 1
    if least > num_sites:
        raise ConfigError("colluders", colluders, f"must be fewer than the {num_sites} sites of the run")
    return least
