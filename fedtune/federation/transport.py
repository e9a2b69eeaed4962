"""Interface between the round loop and the network: requests to the sites, and their answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.federation.protocol import Reply, Signed
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Receipt, Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A signed message from the lead to one site, with its attachments."""

    site: str
    signed: Signed
    adapter: Adapter | None = None  # the adapter to train, or the final adapter of the run
    settings: str = ""  # JSON of the run's configuration, for a site without it
    # messages of other sites, attached to a step of secure aggregation; None for any other message
    parts: Sequence[bytes] | None = None


class Transport(Protocol):
    """A connection that sends messages to sites and yields each answer on arrival, so that memory holds one answer at a
    time.

    An exchange ends when all sites have answered or after `timeout_s` seconds; with real sites it can end earlier, by
    `StoppingRule`.  A site that answers with a message of another type counts as silent.  No message is trusted without
    a site's signature.
    """

    def wait_for_sites(self, sites: Collection[str], *, timeout_s: float) -> Collection[str]:
        """Wait until `sites` are connected, and return all connected sites."""

    def invite(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Send invitations to a run and yield the replies of the sites."""

    def train(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Request the updates of a round and yield the replies of the sites."""

    def take_sum_step(
        self, questions: Sequence[Question], *, timeout_s: float
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        """Request a step of secure aggregation and yield the answers of the sites."""

    def end(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Receipt | None]]:
        """Announce the end of a run; each site answers with a receipt for its charges, or None."""

    def take_traffic(self) -> tuple[int, int]:
        """Return the payload bytes sent to the sites and received from them since the last call."""
