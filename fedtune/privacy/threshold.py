"""How many sites must help with a secure sum, so that a server cannot read two; sums and their noise go by it."""

from __future__ import annotations

from typing import Literal

from fedtune.spec import ConfigError

Server = Literal["curious", "malicious"]
"""What a lead may do: "curious" keeps to the protocol and looks at all it gets; "malicious" does what it likes."""


def least_threshold(num_sites: int, *, colluders: int, server: Server) -> int:
    """The least number of sites that must help to unmask a release, so that no two sets of survivors can be unmasked.

    Two sets would need 2t confirmations.  Against a malicious server each colluder confirms both and each other site
    one, K + c in all, so 2t > K + c keeps the second from coming together.  A curious server asks for one set, and
    t > c keeps its colluders from reading shares without it; t > K/2 stays, so that sites do not depend on its word
    where nobody colludes.

    Args:
        num_sites: K, of the run.
        colluders: c, sites that tell the server everything and do what it says.
        server: what it may do.

    Raises:
        ConfigError: no number of these sites withstands as many colluders.
    """
    alone = num_sites // 2 + 1
    least = max(alone, colluders + 1) if server == "curious" else (num_sites + colluders) // 2 + 1
    if least > num_sites:
        raise ConfigError("colluders", colluders, f"must be fewer than the {num_sites} sites of the run")
    return least
