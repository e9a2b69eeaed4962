"""Settings of a federation: sites, rounds, aggregation rule, and warm start on public records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from operator import attrgetter
from typing import Any, Literal

from fedtune.federation.secure.agreement import MAX_SITES_OF_SUM
from fedtune.privacy.distributed_noise import SecureAggregationSpec
from fedtune.privacy.release import Offer, Reason
from fedtune.privacy.threshold import min_threshold
from fedtune.spec import (
    ConfigError,
    check_at_least,
    check_at_most,
    check_name,
    check_one_of,
    check_positive,
    format_value,
    spec,
)
from fedtune.training.algorithms.algorithm_registry import get_algorithm
from fedtune.training.algorithms.local_algorithm import LocalAlgorithm

MAX_SITES = 10_000  # a limit on settings from untrusted sources


@spec
class FederationSpec:
    """The rounds, the sites and the aggregation rule of a federation.

    Attributes:
        num_rounds: the number of exchanges between server and sites.
        num_sites: the number of sites in a simulation.
        site_names: the names of the sites in a simulation; empty: site-1, site-2, ...
        participants: the names of the participating sites in a simulation; empty: all sites.
        min_sites: the minimum number of updates in a round; with fewer the run ends.
        if_over_budget: what to do when a site's budget cannot cover the plan: "stop" (the site refuses),
            "fewer_rounds" (the most rounds that every site allows) or "more_noise" (the least noise that every site
            allows).
        spare_rounds: additional rounds covered by the noise calibration, so that an interrupted round can be retried,
            and an unreadable sum of secure aggregation can be replaced by another release.
        early_stopping_patience: end the run early after this many rounds without a better score on the lead's
            own validation file; null: run all rounds.  The unused budget of the sites is released; the run still claims
            the planned epsilon.
        checkpoint_selection: whether the result of the run is the adapter of the "last" round, or of the round with the
            "best" score on that file.
        aggregation: "plain" averages the sites' updates, each with its own noise; "secure" sums the sites' noisy
            gradient sums so that the lead learns only the total, and the lead applies the optimizer step.  With
            "secure", rounds, steps, threshold and rates that are not set are chosen automatically
            (docs/secure_aggregation.md).
        update_dtype: the number format of a plain update on its way to the lead: "bfloat16" sends the rounded
            difference to the adapter that the site received, "float32" takes twice the bytes.  Has no effect on secure
            aggregation, which sends integers.
        threshold: the minimum number of sites in a sum of secure aggregation; null: the smallest threshold that is
            secure against a malicious server.  If training.local_steps is null too: `enough_sites`, or all sites if
            that is null as well.
        colluders: the number of sites that may collude with the server and reveal their noise to it.  In secure
            aggregation, the guarantee then relies only on the noise of the other sites.
        algorithm: the federated algorithm, which determines local training at the sites and aggregation at the lead:
            "fedavg", "fedprox", "scaffold" or another algorithm of docs/adapters.md.  Updates are weighted by
            declared size.  The privacy guarantee is the same for every algorithm.
        algorithm_settings: the algorithm's own settings, by key; null: the defaults.
        ranks: the LoRA ranks of the sites in order, repeated as needed, at most `lora.rank` (docs/adapters.md).  Empty:
            `lora.rank` at every site.
        renewal: the number of earlier runs in this series of renewals; `--renew` increments it.
        round_timeout_s: the timeout for the replies of a round, in seconds.
        enough_sites: the number of updates after which a round waits only `straggler_grace_s` for stragglers; null: a
            round waits for every site that is working.
        straggler_grace_s: the additional wait for stragglers, in seconds, after a round has `enough_sites` updates, or
            has `min_sites` updates and all other sites are offline, paused, awaiting approval or have refused.
    """

    num_rounds: int = 5
    num_sites: int = 4
    site_names: tuple[str, ...] = ()
    participants: tuple[str, ...] = ()
    min_sites: int = 1
    spare_rounds: int = 0
    if_over_budget: Literal["stop", "fewer_rounds", "more_noise"] = "stop"
    early_stopping_patience: int | None = None
    checkpoint_selection: Literal["last", "best"] = "last"
    aggregation: Literal["plain", "secure"] = "plain"
    update_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threshold: int | None = None
    colluders: int = 0
    algorithm: str = "fedavg"
    algorithm_settings: Any = None
    ranks: tuple[int, ...] = ()
    renewal: int = 0
    round_timeout_s: float = 3600.0
    enough_sites: int | None = None
    straggler_grace_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_sites", "min_sites"):
            check_at_least(name, getattr(self, name), 1)
        check_at_most("num_sites", self.num_sites, MAX_SITES)
        for name in ("spare_rounds", "renewal"):
            check_at_least(name, getattr(self, name), 0)
        if self.site_names and len(self.site_names) != self.num_sites:
            raise ConfigError("site_names", list(self.site_names), f"must list num_sites = {self.num_sites} names")
        for name in self.site_names:
            if "." in name:
                raise ConfigError("site_names", name, "must not contain a '.'")
            check_name("site_names", name)
        if len({name.lower() for name in self.site_names}) != len(self.site_names):  # folders on case-insensitive disks
            raise ConfigError("site_names", list(self.site_names), "must not repeat a name, ignoring case")
        names = set(self.names)
        for name in self.participants:
            if name not in names:
                check_one_of("participants", name, self.names)
        if self.min_sites > len(self.active):
            bound = f"must be at most {len(self.active)}, the number of participating sites"
            raise ConfigError("min_sites", self.min_sites, bound)
        if self.early_stopping_patience is not None:
            check_at_least("early_stopping_patience", self.early_stopping_patience, 1)
        object.__setattr__(self, "algorithm_settings", self.bound_algorithm.own)
        self._check_sums()
        self._check_ranks()
        check_positive("round_timeout_s", self.round_timeout_s)
        check_at_least("straggler_grace_s", self.straggler_grace_s, 0)
        if self.enough_sites is not None and not self.required_sites <= self.enough_sites <= len(self.active):
            bound = f"must be from {self.required_sites} (the minimum) to {len(self.active)} (all participating sites)"
            raise ConfigError("enough_sites", self.enough_sites, bound)

    def _check_sums(self) -> None:
        together = self.together  # raises if a malicious server could unmask two sums
        if together is None:
            for name, none in (("threshold", None), ("colluders", 0)):
                if getattr(self, name) != none:
                    raise ConfigError(name, getattr(self, name), "requires federation.aggregation = secure")
            return
        if together.num_sites > MAX_SITES_OF_SUM:
            bound = f"must be at most {MAX_SITES_OF_SUM} participating sites with federation.aggregation = secure"
            raise ConfigError("num_sites", together.num_sites, bound)
        if why := self.bound_algorithm.not_in_sums:
            raise ConfigError("algorithm", self.algorithm, f"requires federation.aggregation = plain: {why}")

    def _check_ranks(self) -> None:
        if not self.ranks:
            return
        for rank in self.ranks:
            check_at_least("ranks", rank, 1)
        if self.aggregation == "secure":
            bound = "requires federation.aggregation = plain: in a sum every site sends all values with noise on each"
            raise ConfigError("ranks", list(self.ranks), bound)
        if why := self.bound_algorithm.not_with_ranks:
            raise ConfigError("ranks", list(self.ranks), f"is not available for algorithm {self.algorithm}: {why}")

    @property
    def site_ranks(self) -> dict[str, int | None]:
        """The rank of each participating site; None: the site trains the whole adapter."""
        ranks = self._map_ranks()
        return {site: ranks.get(site) for site in self.active}

    def _map_ranks(self) -> dict[str, int]:
        """Map every site to its rank; empty if the sites train the whole adapter."""
        return dict(zip(self.names, cycle(self.ranks), strict=False))

    def lower_ranks(self, offers: Sequence[Offer]) -> list[int]:
        """Return `ranks`, lowered to the rank that each site offers."""
        ranks = self._map_ranks()
        most = {offer.site: offer.rank for offer in offers if offer.rank is not None}
        lowered = {site: min(rank, most.get(site, rank)) for site, rank in ranks.items()}
        return list(self.ranks if lowered == ranks else lowered.values())

    def check_requirements(self, run: object) -> None:
        """Check that the settings of a run meet the requirements of its algorithm.

        Raises:
            ConfigError: a setting has another value than the algorithm requires.
        """
        for key, (only, why) in self.bound_algorithm.requires.items():
            if attrgetter(key)(run) != only:
                shown = only if isinstance(only, str) else format_value(only)
                raise ConfigError("federation.algorithm", self.algorithm, f"requires {key} = {shown}: {why}")
        kind, rank = attrgetter("lora.kind", "lora.rank")(run)
        if self.ranks and kind != "lora":
            raise ConfigError("federation.ranks", list(self.ranks), f"requires lora.kind = lora, not {kind}")
        if len(self.ranks) > self.num_sites:
            bound = f"must have at most one rank for each of {self.num_sites} sites"
            raise ConfigError("federation.ranks", list(self.ranks), bound)
        if self.ranks and max(self.ranks) > rank:
            bound = f"must be at most lora.rank = {rank}, the rank of the shared adapter"
            raise ConfigError("federation.ranks", list(self.ranks), bound)

    @property
    def bound_algorithm(self) -> LocalAlgorithm:
        """The federated algorithm, configured with the run's `algorithm_settings`."""
        return get_algorithm(self.algorithm, self.algorithm_settings)

    @property
    def required_sites(self) -> int:
        """The minimum number of sites with an update for a round to succeed."""
        together = self.together
        return self.min_sites if together is None else max(self.min_sites, together.threshold)

    @property
    def together(self) -> SecureAggregationSpec | None:
        """The joint noise parameters of secure aggregation; None if every site adds its own noise."""
        if self.aggregation == "plain":
            return None
        sites, threshold = len(self.active), self.threshold
        if threshold is None:
            threshold = min_threshold(sites, colluders=self.colluders)
        return SecureAggregationSpec(num_sites=sites, threshold=threshold, colluders=self.colluders)

    @property
    def uses_validation_scores(self) -> bool:
        """Whether the run uses early stopping or checkpoint selection, which need validation scores."""
        return self.early_stopping_patience is not None or self.checkpoint_selection == "best"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all sites, in a fixed order."""
        return self.site_names or tuple(f"site-{number}" for number in range(1, self.num_sites + 1))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the participating sites, in the order of `names`."""
        chosen = set(self.participants or self.names)
        return tuple(name for name in self.names if name in chosen)

    def explain_too_few(self, count: int, did: str, *, others: Mapping[str, str]) -> str:
        """Return the error text for a step with too few successful sites, including the reason of each other site.

        Args:
            count: the number of sites that succeeded.
            did: the predicate of the sentence about these sites, for example "sent an update".
            others: site -> the reason for its failure.
        """
        reasons = ", ".join(f"{site}: {why}" for site, why in others.items())
        key = "min_sites" if self.required_sites == self.min_sites else "threshold"
        needed = f"federation.{key} = {self.required_sites} are required"
        hint = f"; for {Reason.SITE_ERROR}, read the site's log" if Reason.SITE_ERROR in others.values() else ""
        return f"{count} of {len(self.active)} sites {did}, but {needed} ({reasons}{hint})"


@spec
class PublicSpec:
    """Warm start before round 1: the lead trains without privacy on public records, and the sites start from the
    result.

    A value of null is chosen when the run is composed (docs/adapters.md).

    Attributes:
        train_file: a file of public records, labeled like the sites' records.  Setting this file is a declaration that
            its records are public.  Null: no warm start.
        columns: the column for each role in this file, as in `data.columns`; null: the same columns.  A language model
            may read plain texts here ({text: body}) and other records at the sites.
        num_rounds: the number of rounds in the warm start; null: `federation.num_rounds`.
        local_steps: the number of optimizer steps in each round; null: `training.local_steps`.
        learning_rate: the learning rate of the LoRA tensors in the warm start; null: one third of the rate for training
            without privacy.
        head_learning_rate: the learning rate of the task head in the warm start; null: chosen by the same rule.
    """

    train_file: str | None = None
    columns: Mapping[str, str] | None = None
    num_rounds: int | None = None
    local_steps: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None

    def __post_init__(self) -> None:
        settings = {key: value for key, value in asdict(self).items() if value is not None}
        if self.train_file is None and settings:
            key, value = next(iter(settings.items()))
            raise ConfigError(key, value, "requires public.train_file, a file of public records")
        if self.train_file is not None and not self.train_file.strip():
            raise ConfigError("train_file", self.train_file, "must not be blank")
        for key in {"num_rounds", "local_steps"} & {*settings}:
            check_at_least(key, settings[key], 1)
        for key in {"learning_rate", "head_learning_rate"} & {*settings}:
            check_positive(key, settings[key])
