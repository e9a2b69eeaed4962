"""How a lead's questions reach its sites and their answers come back: all that rounds need of whatever carries them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.federation.protocol import Reply, Signed
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Receipt, Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A lead's signed word for one site, with what travels beside it."""

    site: str
    signed: Signed
    adapter: Adapter | None = None  # that a round begins in, or that a run ends with
    settings: str = ""  # JSON of the run's configuration, for a site that does not have it
    # the sites' messages that a step of a secure sum goes by; None: it is no such step
    parts: Sequence[bytes] | None = None


class Transport(Protocol):
    """Carries questions to sites, and yields each answer as it comes, so that memory need not hold two.

    An exchange ends when all have answered or `timeout_s` is over; with real sites sooner, as `Closing` has it.  A site
    with an answer of another kind counts as silent.  Nothing that comes is believed without a site's signature.
    """

    def reach(self, sites: Collection[str], *, timeout_s: float) -> Collection[str]:
        """The sites that can be asked; `sites` are waited for."""

    def invite(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Ask whether sites would take part in a run."""

    def train(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        """Ask for updates."""

    def sum_up(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, bytes | Refusal]]:
        """Ask for a step of a secure sum."""

    def end(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Receipt | None]]:
        """Tell that a run is over; the answers say what it was charged."""

    def traffic(self) -> tuple[int, int]:
        """Payload to the sites and from them since the last call, in bytes."""
