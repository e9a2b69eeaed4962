"""The interface between the round logic and the network: how the lead's questions reach the sites, and the answers come
back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.federation.protocol import Reply, Signed
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Receipt, Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A lead's signed question for one site, with its attachments."""

    site: str
    signed: Signed
    adapter: Adapter | None = None  # that a round begins in, or that a run ends with
    settings: str = ""  # JSON of the run's configuration, for a site that does not have it
    # the sites' messages that a step of secure aggregation goes by; None: it is no such step
    parts: Sequence[bytes] | None = None


class Transport(Protocol):
    """A connection that sends questions to sites and yields each answer as it arrives, so that memory holds one answer
    at a time.

    An exchange ends when all sites have answered or `timeout_s` is over; with real sites it can end sooner, by the rule
    in `StoppingRule`.  A site that answers with a message of another type counts as silent.  No message is trusted
    without a site's signature.
    """

    def wait_for_sites(self, sites: Collection[str], *, timeout_s: float) -> Collection[str]:
        """Wait for `sites`, and return all sites that can be asked."""

    def invite(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Ask sites whether they would take part in a run."""

    def train(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Request updates from sites."""

    def take_sum_step(
        self, questions: Sequence[Question], *, timeout_s: float
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        """Request a step of secure aggregation from sites."""

    def end(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Receipt | None]]:
        """Notify sites that a run is over; each answer is a receipt of what the run was charged."""

    def traffic(self) -> tuple[int, int]:
        """Return the payload sent to the sites and received from them since the last call, in bytes."""
