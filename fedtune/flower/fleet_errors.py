"""Why a site could not talk to its server, in the few kinds that it can do something about."""

from __future__ import annotations

from fedtune.spec import RunError


class Unauthorised(RunError):
    """The server does not take this node: its key is unknown, or was revoked."""


class Expired(Unauthorised):
    """The certificate of this node has ended."""


class Unreachable(RunError):
    """The server cannot be reached, or has no time; asking again later may help."""


class Foreign(Unreachable):
    """What answers is no server of fedtune's."""


class Dropped(RunError):
    """The server takes no answer to this message any more; whoever asked will ask again."""
