"""The errors of a site's connection to the server, one for each way in which a site can react."""

from __future__ import annotations

from fedtune.spec import RunError


class Unauthorised(RunError):
    """Raised if the server rejects this node: its key is unknown or revoked."""


class Expired(Unauthorised):
    """Raised if this node's certificate has expired."""


class Unreachable(RunError):
    """Raised if the server cannot be reached or is overloaded; a later attempt may succeed."""


class Foreign(Unreachable):
    """Raised if the answer does not come from a fedtune server."""


class Dropped(RunError):
    """Raised if the server no longer accepts an answer to this message; the lead will ask again."""
