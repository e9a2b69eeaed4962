"""Errors of a site's connection to the server, one class for each way in which the site handles them."""

from __future__ import annotations

from fedtune.spec import RunError


class Unauthorized(RunError):
    """The server rejects this node, because its key is unknown or revoked."""


class Expired(Unauthorized):
    """The certificate of this node has expired."""


class Unreachable(RunError):
    """The server is unreachable or overloaded; a retry may succeed."""


class NotFedtuneServer(Unreachable):
    """The answer comes from a server that is not a fedtune server."""


class MessageGone(RunError):
    """The server no longer accepts an answer to this message; the lead will repeat the question."""
