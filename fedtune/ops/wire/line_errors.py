"""The errors of a site's line to the server: a site can do something different about each."""

from __future__ import annotations

from fedtune.spec import RunError


class Unauthorised(RunError):
    """The server does not take this node: its key is unknown, or was revoked."""


class Expired(Unauthorised):
    """The certificate of this node has ended."""


class Unreachable(RunError):
    """The server cannot be reached, or has no time; asking again later may help."""


class Foreign(Unreachable):
    """The answer comes from no server of fedtune's."""


class Dropped(RunError):
    """The server takes no answer to this message any more; the lead that asked will ask again."""
