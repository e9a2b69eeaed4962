"""Trust between sites in secure aggregation: the table `[trust]` of a policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field

from fedtune.privacy.distributed_noise import DistributedNoise
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.release import Reason
from fedtune.spec import check_at_least, check_name, check_positive, spec

Broken = tuple[Reason, object, object]  # broken rule, requested value, allowed value


@spec
class Trust:
    """A site's conditions for secure aggregation, in which the site's own noise may not suffice to protect its records.

    Attributes:
        secure: whether the site participates in secure aggregation.
        min_sites: minimum number of sites in a run.
        min_threshold: minimum number of sites in a sum.
        colluders: number of other sites that may collude with the server without breaking the guarantee.
        max_epsilon_if_all_collude: cap on the epsilon of a run if all other sites collude; null: none.
        members: site -> public key of each other site, obtained directly from that site.
    """

    secure: bool = False
    min_sites: int = 3
    min_threshold: int = 3
    colluders: int = 0
    max_epsilon_if_all_collude: float | None = None
    members: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, least in (("min_sites", 2), ("min_threshold", 2), ("colluders", 0)):
            check_at_least(key, getattr(self, key), least)
        if self.max_epsilon_if_all_collude is not None:
            check_positive("max_epsilon_if_all_collude", self.max_epsilon_if_all_collude)
        for site, key in self.members.items():
            check_name("members", site)
            check_public_key(f"members.{site}", key)

    @property
    def requirements(self) -> dict[str, int]:
        """Minimum number of sites, threshold and number of colluders that a run's plan must have."""
        return {"min_sites": self.min_sites, "min_threshold": self.min_threshold, "colluders": self.colluders}

    def iter_violated_rules(self, shared: DistributedNoise) -> Iterator[Broken]:
        """Yield the trust rules that a plan with secure aggregation breaks."""
        if not self.secure:
            yield Reason.SECURE_AGGREGATION, "yes", "no"
        for reason, requested, least in (
            (Reason.MIN_SITES, shared.num_sites, self.min_sites),
            (Reason.MIN_THRESHOLD, shared.threshold, self.min_threshold),
            (Reason.COLLUDERS, shared.colluders, self.colluders),
        ):
            if requested < least:
                yield reason, requested, f"at least {least}"
