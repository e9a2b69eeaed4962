"""When a lead stops waiting for answers: a rule that reads who answered, and nothing of what they answered with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedtune.federation.spec import FederationSpec


@dataclass
class Closing:
    """Whether one exchange with the sites may end before its time is up.

    Two cases end it, each `grace_s` seconds after it began: `enough_sites` good answers are there; or `min_sites` are,
    and nobody else is at work, for every other site is offline, paused, waiting for a person or has refused.  It ends
    at once when nobody is at work and so many sites have refused that `min_sites` good answers cannot come any more.

    Attributes:
        clock: seconds, of which only differences count.
    """

    spec: FederationSpec
    clock: Callable[[], float] = time.monotonic
    _since: float | None = field(default=None, init=False)

    def is_over(self, *, good: int, at_work: int, others: int) -> bool:
        """Whether to stop waiting now; to be asked again and again.

        Args:
            good: sites with an answer of the kind that was hoped for.
            at_work: sites that are online, were asked and have not answered; before a run begins also those where a
                person is yet to approve it.
            others: sites that are offline, paused or, in a round, not approved yet: an answer may still come.
        """
        if not at_work and good + others < self.spec.min_sites:
            return True
        enough = self.spec.enough_sites or len(self.spec.active)
        if not (good >= enough or (good >= self.spec.min_sites and not at_work)):
            self._since = None
            return False
        if self._since is None:
            self._since = self.clock()
        return self.clock() - self._since >= self.spec.grace_s
