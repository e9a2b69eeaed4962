"""Errors of a site's connection to the server, one for each reaction of the site."""

from __future__ import annotations

from fedtune.spec import RunError


class Unauthorised(RunError):
    """The server rejects this node, because its key is unknown or revoked."""


class Expired(Unauthorised):
    """The certificate of this node has expired."""


class Unreachable(RunError):
    """The server is unreachable or overloaded; a retry may succeed."""


class Foreign(Unreachable):
    """The answer does not come from a fedtune server."""


class Dropped(RunError):
    """The server no longer accepts an answer to this message; the lead will ask again."""
