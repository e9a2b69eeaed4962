"""The lead: its part in a run, its knowledge between two rounds, what sites were charged by it, and how it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedtune.codec import decode_value, parse_json
from fedtune.federation.replies import BEYOND_PLAN, INVALID_UPDATE, RoundReplies
from fedtune.federation.run_folder import ASKED, format_checkpoint_name, list_checkpoints, lock_folder
from fedtune.formatting import convert_infinite_to_none
from fedtune.model.adapter import Adapter
from fedtune.privacy import accountant
from fedtune.privacy.durable import write_durably
from fedtune.privacy.release import Receipt
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError, RunError, StuckError, check_at_least, spec

if TYPE_CHECKING:
    from fedtune.federation.invitation import ProposedRun
    from fedtune.model.spec import LoraSpec
    from fedtune.training.spec import TrainingSpec

Arrays = Mapping[str, npt.NDArray[np.float32]]
Scores = Mapping[str, float | None]
"""Name -> score on a file of the lead; None, or a number that is not finite: the model diverged."""


@spec
class RoundResult:
    """The outcome of one round, as stored in `run.json`.

    Attributes:
        round: the number of the round, from 1.
        seconds: the time from the first request to the score of the aggregated adapter.
        sites: the sites that contributed an update.
        failed_sites: site -> the reason why it contributed none.
        bytes_down, bytes_up: the payload sent to the sites and received from them.
        metrics: the scores of the aggregated adapter on the lead's validation file.
        site_scores: with `privacy.metrics=noised`, site -> the noised score of its held-out records and their noised
            count, both as shares of the declared size, for the adapter that the round started from.
        ended: the UTC time at which the round was aggregated and scored.
        diverged: whether the average, or its score, was not finite.  The run then went back to the adapter before the
            round, and `metrics` are the scores of that adapter.  The round is charged all the same.
    """

    round: int
    seconds: float
    sites: tuple[str, ...]
    failed_sites: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    metrics: Scores
    site_scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ended: str
    diverged: bool = False

    def has_update_from(self, site: str) -> bool:
        """Return True if the site sent an update in this round, and so was charged, even if the lead rejected the
        update.
        """
        return site in self.sites or self.failed_sites.get(site) in (INVALID_UPDATE, BEYOND_PLAN)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeadState:
    """The state of a run between two rounds: everything that a resumed run needs."""

    round: int  # rounds finished so far
    adapter: Adapter  # aggregated after that round
    best: Adapter | None = None  # of the round that the run keeps, where that is not the newest; None: it is
    strategy: Arrays = field(default_factory=dict)  # arrays of the server optimizer, empty for plain averaging
    algorithm: Arrays = field(default_factory=dict)  # arrays of the algorithm's lead half, empty before round 1
    receipts: Mapping[str, Receipt] = field(default_factory=dict)  # site -> its newest receipt
    unanswered: Mapping[str, int] = field(default_factory=dict)  # site -> rounds asked of it since that receipt
    rounds: tuple[RoundResult, ...] = ()  # one result for each finished round
    seconds: float = 0.0  # wall time so far, over all starts of the run
    metrics_before: Scores = field(default_factory=dict)  # of the initial adapter on the test file
    # of an adapter that the run began in, what `run.json` says of it; None: it began in a new one.
    start_adapter: Mapping[str, Any] | None = None
    data_changed: tuple[str, ...] = ()  # simulated sites whose records were others when the run was resumed

    @property
    def kept_adapter(self) -> Adapter:
        """The adapter that the run would keep if it ended now."""
        return self.adapter if self.best is None else self.best

    @property
    def seconds_per_round(self) -> float | None:
        """The expected time for another round with its scores, in seconds; None after fewer than two rounds.

        The first round is ignored because it includes one-time work.  The median leaves out interruptions.
        """
        ends = [datetime.fromisoformat(one.ended) for one in self.rounds]
        if len(ends) < 2:
            return None
        between = median((later - end).total_seconds() for end, later in pairwise(ends))
        return max(between, median(one.seconds for one in self.rounds[1:]))  # ends are in whole seconds

    def with_requests_to(self, sites: Sequence[str]) -> LeadState:
        """Return the state after a round was requested from `sites`: each of them may be charged until it answers."""
        counts = {site: self.unanswered.get(site, 0) + (site in sites) for site in {*self.unanswered, *sites}}
        return replace(self, unanswered=counts)

    def with_receipt(
        self, site: str, receipt: Receipt | None, *, run: str, plan: Plan, update: bool = False
    ) -> LeadState | None:
        """Return the state with a site's new receipt, which shows what the site was charged; None if the receipt is
        invalid.

        A receipt is invalid if it belongs to another run or site, if it is unsigned or signed with a new key, if it
        counts more rounds than the plan has or fewer than the updates that the site sent, or if its counters went
        backwards because the ledger was lost or restored from a backup.  The site then counts as silent, and an
        `update` that came with the receipt is discarded.
        """
        if receipt is None or (receipt.run, receipt.site) != (run, site):
            return None
        # Each update was charged: a receipt that counts fewer is an old one, which a server put in a newer one's place.
        updates = update + sum(result.has_update_from(site) for result in self.rounds)
        # No ledger grants a run more rounds than its plan has.
        if not (updates <= receipt.charged_rounds <= plan.most_rounds and receipt.has_valid_signature()):
            return None
        old = self.receipts.get(site, receipt)
        newer = receipt.charged_rounds >= old.charged_rounds and receipt.sequence >= old.sequence
        if not newer or receipt.site_key != old.site_key:
            return None
        unanswered = {other: count for other, count in self.unanswered.items() if other != site}
        return replace(self, receipts={**self.receipts, site: receipt}, unanswered=unanswered)


def merge_receipts(one: Mapping[str, Receipt], other: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """Merge two sets of receipts, and keep the newer receipt of each site.

    If the keys differ, the ledgers differ too, and the receipt in `other` is kept.
    """
    newest = dict(one)
    for site, receipt in other.items():
        known = newest.get(site)
        if known is None or receipt.site_key != known.site_key or receipt.sequence >= known.sequence:
            newest[site] = receipt
    return newest


def read_receipts(path: Path) -> dict[str, Receipt]:
    """Read the newest receipt of each site from a JSON file; empty if the file does not exist.

    The next request sends each receipt back to its site, which can thus detect that its ledger was lost or restored
    from a backup.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        known = parse_json(path.read_bytes(), key=str(path), bound="must map sites to their receipts")
        return dict(decode_value("receipts", known, Mapping[str, Receipt]))
    except ConfigError as error:
        raise RunError(f"{path} is damaged; the sites' last receipts are unknown") from error


def save_receipts(path: Path, receipts: Mapping[str, Receipt]) -> None:
    """Merge `receipts` into the file, and keep the newer receipt of each site."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(path.parent):  # two runs of a lead may end at once
        newest = {site: receipt.to_json() for site, receipt in merge_receipts(read_receipts(path), receipts).items()}
        write_durably(path, json.dumps(newest, indent=1).encode() + b"\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCharge:
    """The privacy cost of a run at one site, derived from the site's receipts and the numbers of the plan.

    An epsilon of None means that no finite bound exists.
    """

    epsilon: float | None = None  # by PLD, at the plan's delta; `epsilon_rdp` by RDP
    epsilon_rdp: float | None = None
    rounds: int  # charged, retries included; `steps` are theirs
    # of the whole plan, by PLD: the figure that is proved whatever made the run end.  `epsilon` is one only where that
    # did not depend on what the run had released.
    planned_epsilon: float | None = None
    steps: int
    sampling_rate: float
    noise_multiplier: float
    metrics_noise_multiplier: float
    upper_bound: bool  # the site fell silent, so every round asked of it since its last receipt is counted as charged

    @property
    def proven_epsilon(self) -> float | None:
        """The proven epsilon, valid however the run ended: that of the whole plan, or 0 if no round was charged."""
        return self.planned_epsilon if self.rounds else self.epsilon


def compute_site_charge(state: LeadState, site: str, plan: Plan) -> SiteCharge:
    """Derive the privacy cost of this run at `site` from its charged rounds; only `planned_epsilon` covers the whole
    plan.

    A silent site may have been charged for every round requested since its last receipt, but never for more rounds than
    the plan has, because its ledger grants no more.
    """
    receipt = state.receipts.get(site)
    silent = state.unanswered.get(site, 0)
    charged = receipt.charged_rounds if receipt else 0
    rounds = max(charged, min(charged + silent, plan.most_rounds))
    epsilon, epsilon_rdp = compute_charged_epsilons(plan, rounds)
    return SiteCharge(
        epsilon=convert_infinite_to_none(epsilon),
        epsilon_rdp=convert_infinite_to_none(epsilon_rdp),
        rounds=rounds,
        planned_epsilon=convert_infinite_to_none(compute_charged_epsilons(plan, plan.most_rounds)[0]),
        steps=rounds * plan.local_steps,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        metrics_noise_multiplier=plan.metrics_noise_multiplier,
        upper_bound=silent > 0,
    )


@lru_cache(maxsize=256)
def compute_charged_epsilons(plan: Plan, rounds: int) -> tuple[float, float]:
    """Compute the epsilon of `rounds` charged rounds of a plan, by PLD and by RDP."""
    # Cached: sites mostly stand at the same count, and composing takes a moment.
    if rounds == 0:
        return 0.0, 0.0
    spent = [plan.event(rounds=rounds)]
    return accountant.epsilon_pld(spent, plan.delta), accountant.epsilon_rdp(spent, plan.delta)


_KEPT = 2  # checkpoints
_ARRAY_FIELDS = ("adapter", "best", "strategy", "algorithm")  # of `LeadState`


class Checkpoints:
    """The folder `checkpoints/` of a run: `round-0003.safetensors`, and the journal of requested rounds.

    Args:
        folder: the folder; created if it does not exist.
        config_sha256: the digest of the configuration; a checkpoint with another digest is rejected.
    """

    def __init__(self, folder: Path, config_sha256: str) -> None:
        self._folder, self._config = folder, config_sha256
        self._asked, self._session = folder / ASKED, folder / "session.json"

    @property
    def updates_folder(self) -> Path:
        """The folder that holds the updates of a round until they are averaged."""
        return self._folder / "arrived"

    def save_session(self, session: bytes) -> None:
        """Store the state of secure aggregation: the current session, and the sites accused of wrong shares."""
        write_durably(self._session, session)

    def session(self) -> bytes:
        """Read the session stored last by `save_session`; empty if none was stored."""
        return self._session.read_bytes() if self._session.exists() else b""

    def record_request(self, round: int, sites: list[str]) -> None:
        """Record in the journal, before a request is sent, that `sites` may be charged for `round`."""
        line = json.dumps([round, sites]).encode() + b"\n"
        write_durably(self._asked, b"".join(self._complete_lines()) + line)

    def asked(self, *, after: int) -> list[tuple[int, tuple[str, ...]]]:
        """List the requested rounds later than `after`, each with its sites.

        Raises:
            RunError: the journal is damaged.
        """
        try:
            lines = map(json.loads, self._complete_lines())
            rounds = [decode_value("asked", line, tuple[int, tuple[str, ...]]) for line in lines]
            return [(round, sites) for round, sites in rounds if round > after]
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self._asked} is damaged; the rounds that were requested are unknown") from error

    def save(self, state: LeadState) -> None:
        """Write a checkpoint of `state`; after a crash, the previous checkpoint is still intact."""
        best = None if state.best is None else state.best.tensors
        arrays = {
            "adapter": state.adapter.tensors,
            "best": best or {},
            "strategy": state.strategy,
            "algorithm": state.algorithm,
        }
        tensors = {f"{of}/{name}": np.asarray(value) for of, named in arrays.items() for name, value in named.items()}
        about = {"config_sha256": self._config, **{of: list(named) for of, named in arrays.items()}}
        about |= {name: getattr(state, name) for name in _list_non_array_fields()}
        metadata = {
            "fedtune": json.dumps(about, default=lambda one: one.to_json() if isinstance(one, Receipt) else asdict(one))
        }
        write_durably(self._folder / format_checkpoint_name(state.round), save_tensors(tensors, metadata=metadata))
        for old in list_checkpoints(self._folder)[:-_KEPT]:
            old.unlink()

    def load(self) -> LeadState:
        """Load the newest checkpoint, and count every round requested after it as unanswered.

        Raises:
            ConfigError: there is no checkpoint, or it belongs to another configuration.
            StuckError: the newest checkpoint is damaged.
        """
        found = list_checkpoints(self._folder)
        if not found:
            raise ConfigError("resume", str(self._folder.parent), "must be a run folder with a checkpoint")
        data = found[-1].read_bytes()
        try:
            tensors = load_tensors(data)
            size = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedtune"])
            other = about["config_sha256"] != self._config
            arrays = {of: {name: tensors[f"{of}/{name}"] for name in about[of]} for of in _ARRAY_FIELDS}
            state = LeadState(
                adapter=Adapter(arrays["adapter"]),
                best=Adapter(arrays["best"]) if arrays["best"] else None,
                strategy=arrays["strategy"],
                algorithm=arrays["algorithm"],
                **{name: decode_value(name, about[name], hint) for name, hint in _list_non_array_fields().items()},
            )
            check_at_least("rounds", min(state.round, *state.unanswered.values(), 0), 0)
        except Exception as error:
            raise StuckError(f"checkpoint {found[-1]} is damaged: {error}; {_explain_recovery(found)}") from error
        if other:
            raise ConfigError("resume", str(self._folder.parent), "has a different configuration")
        for _, sites in self.asked(after=state.round):
            state = state.with_requests_to(sites)
        return state

    def _complete_lines(self) -> list[bytes]:
        """Return the complete lines of the journal.

        An incomplete last line was cut short by a crash, before any request of its round was sent.
        """
        lines = self._asked.read_bytes().splitlines(keepends=True) if self._asked.exists() else []
        return [line for line in lines if line.endswith(b"\n")]


def _explain_recovery(found: Sequence[Path]) -> str:
    """Say how to continue when the newest checkpoint is damaged.

    A run resumed from the checkpoint before it repeats the requests of the later rounds, which are not charged again.
    """
    if len(found) < 2:
        return "there is no other: start a new run under another name"
    return f"move it away, and resume the run from {found[-2].name}"


def _list_non_array_fields() -> Mapping[str, Any]:
    """Return the fields of `LeadState` that hold no arrays, with their types."""
    hints = get_type_hints(LeadState)
    return {name: hint for name, hint in hints.items() if name not in _ARRAY_FIELDS}


@dataclass(frozen=True, slots=True)
class AggregationResult:
    """The result of one round.

    Attributes:
        sites: the sites whose updates it combines.
        failures: site -> why its update was left out.
        strategy: the server optimizer's state, for a checkpoint.
    """

    adapter: Adapter
    sites: tuple[str, ...]
    failures: Mapping[str, str]
    strategy: Arrays


class Aggregation(Protocol):
    """How a round's updates become the next adapter: the lead's half, for one run, of plain and of secure averages.

    The site's half is `_protect` in `site_round.py`.

    Attributes:
        session: name of the secure aggregation session that the next round belongs to; empty for plain averages.
        left_out: sites that are not asked any more.
    """

    @property
    def session(self) -> str: ...

    @property
    def left_out(self) -> Collection[str]: ...

    def resume(self, state: LeadState) -> LeadState:
        """Start, or resume after an interruption, at `state`; returns the state to continue from."""

    def prepare(self) -> Sequence[str]:
        """Choose the sites of the next round, before any is charged; raises RunError if they are too few."""

    def combine(self, state: LeadState, replies: RoundReplies) -> AggregationResult:
        """Combine a round's valid updates into the next adapter; raises RunError if rounds cannot go on."""

    def restore(self, strategy: Arrays) -> None:
        """Restore an earlier state of the server optimizer."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The lead's part in a run."""

    asked: ProposedRun  # who is asked about what
    training: TrainingSpec  # how each site steps, which bounds how far an update can be from the adapter that was sent
    lora: LoraSpec  # which tensors rest in a round
    declared_sizes: Mapping[str, int]  # site -> the size it publishes; the weights of the average
    average: Aggregation  # makes the next adapter of plain updates
    checkpoints: Checkpoints
    evaluate: Callable[[Adapter], Mapping[str, float]]  # scores an adapter on the lead's own validation data
    finished: Callable[[LeadState], None]  # called with the state after each round
    elapsed: Callable[[], float]  # seconds since the run began, interruptions left out
    # site -> the newest one of earlier runs, to be sent back until this run has one
    earlier_receipts: Mapping[str, Receipt] = field(default_factory=dict)
    gives_adapter: bool = False  # whether the sites receive the final adapter
    primary_metric: str = (
        "loss"  # of these scores the one that may decide when the run ends, and whose adapter it keeps
    )

    @property
    def run(self) -> str:
        """The run's name at its sites."""
        return self.asked.proposal.run

    @property
    def plan(self) -> Plan:
        """The run's plan."""
        return self.asked.proposal.plan
