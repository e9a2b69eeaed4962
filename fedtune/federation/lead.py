"""The lead's state between rounds, its checkpoints, and the privacy cost of a run at each site."""

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

from fedtune.codec import decode_value, parse_json, read_regular_file
from fedtune.federation.replies import BEYOND_PLAN, INVALID_UPDATE, RoundReplies
from fedtune.federation.run_folder import ASKED, format_checkpoint_name, list_checkpoints
from fedtune.formatting import convert_infinite_to_none
from fedtune.model.adapter import Adapter
from fedtune.privacy import accountant
from fedtune.privacy.durable import lock_folder, write_durably
from fedtune.privacy.release import Receipt
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError, RunError, StuckError, check_at_least, spec

if TYPE_CHECKING:
    from fedtune.federation.invitation import ProposedRun
    from fedtune.model.spec import LoraSpec
    from fedtune.training.spec import TrainingSpec

Arrays = Mapping[str, npt.NDArray[np.float32]]
Scores = Mapping[str, float | None]
"""Metric name -> score on a file of the lead; None or a non-finite number means that the model diverged."""


@spec
class RoundResult:
    """Outcome of one round, as stored in `run.json`.

    Attributes:
        round: the number of the round, from 1.
        seconds: the time from the first request to the score of the aggregated adapter.
        sites: the sites that contributed an update.
        failed_sites: site -> the reason for its missing update.
        bytes_down, bytes_up: the payload sent to the sites and received from them.
        metrics: the scores of the aggregated adapter on the lead's validation file.
        site_scores: with `privacy.metrics=noised`, site -> the noised score of its held-out records and their noised
            count, both as shares of the declared size, for the adapter that the round started from.
        ended: the UTC time at which the round was aggregated and scored.
        diverged: whether the average or its score was not finite.  The run was then rolled back to the previous
            adapter, and `metrics` are the scores of that adapter.  The round stays charged.
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
        """Return True if the site sent an update in this round, valid or rejected, and was therefore charged."""
        return site in self.sites or self.failed_sites.get(site) in (INVALID_UPDATE, BEYOND_PLAN)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeadState:
    """State of a run between two rounds: everything that is needed to resume the run."""

    round: int  # the number of finished rounds
    adapter: Adapter  # the adapter after that round
    best: Adapter | None = None  # the adapter of the selected round; None: the newest round is selected
    strategy: Arrays = field(default_factory=dict)  # state of the server optimizer, empty for plain averaging
    algorithm: Arrays = field(default_factory=dict)  # state of the algorithm at the lead, empty before round 1
    receipts: Mapping[str, Receipt] = field(default_factory=dict)  # site -> its newest receipt
    unanswered: Mapping[str, int] = field(default_factory=dict)  # site -> rounds requested since that receipt
    rounds: tuple[RoundResult, ...] = ()  # one result for each finished round
    seconds: float = 0.0  # wall time so far, over all starts of the run
    metrics_before: Scores = field(default_factory=dict)  # scores of the initial adapter on the test file
    # the entry in `run.json` about the adapter that the run started from; None: a freshly initialized adapter
    start_adapter: Mapping[str, Any] | None = None
    data_changed: tuple[str, ...] = ()  # simulated sites whose records had changed when the run was resumed

    @property
    def kept_adapter(self) -> Adapter:
        """The adapter of the round that checkpoint selection prefers so far: the result if the run ended now."""
        return self.adapter if self.best is None else self.best

    @property
    def seconds_per_round(self) -> float | None:
        """The expected duration of the next round with its evaluation, in seconds; None before two finished rounds.

        The first round is ignored because it includes one-time work.  The median is robust to interruptions.
        """
        ends = [datetime.fromisoformat(result.ended) for result in self.rounds]
        if len(ends) < 2:
            return None
        between = median((later - end).total_seconds() for end, later in pairwise(ends))
        return max(between, median(result.seconds for result in self.rounds[1:]))  # ends are in whole seconds

    def with_requests_to(self, sites: Sequence[str]) -> LeadState:
        """Return the state after requesting a round from `sites`; each site may be charged until it answers."""
        counts = {site: self.unanswered.get(site, 0) + (site in sites) for site in {*self.unanswered, *sites}}
        return replace(self, unanswered=counts)

    def with_receipt(
        self, site: str, receipt: Receipt | None, *, run: str, plan: Plan, update: bool = False
    ) -> LeadState | None:
        """Return the state with a site's newest receipt, the proof of its charges; None if the receipt is invalid.

        A receipt is invalid if it belongs to another run or site, is unsigned, is signed with a new key, counts more
        rounds than the plan has or fewer rounds than the site's updates, or has lower counters than an earlier receipt
        because the ledger was lost or restored from a backup.  The site then counts as silent, and an `update` sent
        with the receipt is discarded.
        """
        if receipt is None or (receipt.run, receipt.site) != (run, site):
            return None
        # Each update was charged, so a receipt that counts fewer rounds is stale: a server may have replayed it.
        updates = update + sum(result.has_update_from(site) for result in self.rounds)
        # No ledger grants a run more rounds than its plan has.
        if not (updates <= receipt.charged_rounds <= plan.max_rounds and receipt.has_valid_signature()):
            return None
        old = self.receipts.get(site, receipt)
        newer = receipt.charged_rounds >= old.charged_rounds and receipt.sequence >= old.sequence
        if not newer or receipt.site_key != old.site_key:
            return None
        unanswered = {other: count for other, count in self.unanswered.items() if other != site}
        return replace(self, receipts={**self.receipts, site: receipt}, unanswered=unanswered)


def merge_receipts(one: Mapping[str, Receipt], other: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """Merge two mappings from site to receipt; the newer receipt of each site wins.

    If the keys of the two receipts differ, the ledgers differ too, and the receipt in `other` wins.
    """
    newest = dict(one)
    for site, receipt in other.items():
        known = newest.get(site)
        if known is None or receipt.site_key != known.site_key or receipt.sequence >= known.sequence:
            newest[site] = receipt
    return newest


def read_receipts(path: Path) -> dict[str, Receipt]:
    """Read the newest receipt of each site from a JSON file; empty if the file does not exist.

    The next request returns each receipt to its site, so that the site can detect a lost or restored ledger.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        known = parse_json(read_regular_file(path), key=str(path), bound="must map sites to their receipts")
        return dict(decode_value("receipts", known, Mapping[str, Receipt]))
    except ConfigError as error:
        raise RunError(
            f"the receipts file {path} is damaged, and its last receipts cannot be read; restore the file from a backup"
        ) from error


def save_receipts(path: Path, receipts: Mapping[str, Receipt]) -> None:
    """Merge `receipts` into the receipts file at `path`; the newer receipt of each site wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(path.parent):  # two runs of one lead may end at the same time
        newest = {site: receipt.to_json() for site, receipt in merge_receipts(read_receipts(path), receipts).items()}
        write_durably(path, json.dumps(newest, indent=1).encode() + b"\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCharge:
    """Privacy cost of a run at one site, derived from the site's receipts and the plan.

    An epsilon of None means that no finite bound exists.
    """

    epsilon: float | None = None  # of the charged rounds, by PLD, at the plan's delta
    epsilon_rdp: float | None = None  # of the charged rounds, by RDP
    rounds: int  # charged rounds, including retries
    # epsilon of the whole plan, by PLD, valid regardless of how the run ended; `epsilon` is valid only if the end of
    # the run did not depend on its releases
    planned_epsilon: float | None = None
    steps: int  # steps in the charged rounds
    sampling_rate: float
    noise_multiplier: float
    metrics_noise_multiplier: float
    upper_bound: bool  # the site is silent, so `rounds` includes every round requested since its last receipt

    @property
    def proven_epsilon(self) -> float | None:
        """The epsilon that is valid however the run ended: `planned_epsilon`, or 0 if no round was charged."""
        return self.planned_epsilon if self.rounds else self.epsilon


def compute_site_charge(state: LeadState, site: str, plan: Plan) -> SiteCharge:
    """Compute the privacy cost of this run at `site` from its charged rounds; `planned_epsilon` covers the whole plan.

    A silent site may have been charged for every round requested since its last receipt, but never for more rounds than
    the plan has, because its ledger grants no more.
    """
    receipt = state.receipts.get(site)
    silent = state.unanswered.get(site, 0)
    charged = receipt.charged_rounds if receipt else 0
    rounds = max(charged, min(charged + silent, plan.max_rounds))
    epsilon, epsilon_rdp = compute_charged_epsilons(plan, rounds)
    return SiteCharge(
        epsilon=convert_infinite_to_none(epsilon),
        epsilon_rdp=convert_infinite_to_none(epsilon_rdp),
        rounds=rounds,
        planned_epsilon=convert_infinite_to_none(compute_charged_epsilons(plan, plan.max_rounds)[0]),
        steps=rounds * plan.local_steps,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        metrics_noise_multiplier=plan.metrics_noise_multiplier,
        upper_bound=silent > 0,
    )


def find_invalid_field(receipt: Receipt, *, site: str, run: str, plan: Plan) -> str:
    """Return the first field of a receipt that does not match this site, run and plan; "" if the receipt is valid.

    A receipt without a plan is valid if it charges no round, because a site that refused the run has not stored its
    plan.
    """
    of_plan = receipt.plan == plan.digest() or (not receipt.plan and not receipt.charged_rounds)
    fits = {"site": receipt.site == site, "run": receipt.run == run, "plan": of_plan}
    fits |= {
        "charged_rounds": 0 <= receipt.charged_rounds <= plan.max_rounds,
        "signature": receipt.has_valid_signature(),
    }
    return next((key for key, right in fits.items() if not right), "")


@lru_cache(maxsize=256)
def compute_charged_epsilons(plan: Plan, rounds: int) -> tuple[float, float]:
    """Compute the epsilon of `rounds` charged rounds of a plan, by PLD and by RDP."""
    # Cached, because most sites have the same count and the composition is slow.
    if rounds == 0:
        return 0.0, 0.0
    spent = [plan.event(rounds=rounds)]
    return accountant.epsilon_pld(spent, plan.delta), accountant.epsilon_rdp(spent, plan.delta)


_MAX_CHECKPOINTS = 2  # older checkpoints are deleted
_ARRAY_FIELDS = ("adapter", "best", "strategy", "algorithm")  # of `LeadState`


class Checkpoints:
    """Checkpoint folder of a run: `checkpoints/round-0003.safetensors` and the journal of requested rounds.

    Args:
        folder: the folder; created if it does not exist.
        config_sha256: the digest of the configuration; a checkpoint with another digest is rejected.
    """

    def __init__(self, folder: Path, config_sha256: str) -> None:
        self._folder, self._config = folder, config_sha256
        self._asked, self._session = folder / ASKED, folder / "session.json"

    @property
    def updates_folder(self) -> Path:
        """The folder that stores the updates of a round until they are averaged."""
        return self._folder / "arrived"

    def save_session(self, session: bytes) -> None:
        """Store the secure aggregation state: the current session and the sites accused of wrong shares."""
        write_durably(self._session, session)

    def load_session(self) -> bytes:
        """Read the session stored by `save_session`; empty if there is none."""
        return read_regular_file(self._session) if self._session.exists() else b""

    def record_request(self, round: int, sites: list[str]) -> None:
        """Append a round and its sites to the journal.

        Must be called before the requests are sent, because each requested site may be charged for the round.
        """
        line = json.dumps([round, sites]).encode() + b"\n"
        write_durably(self._asked, b"".join(self._complete_lines()) + line)

    def list_requests(self, *, after: int) -> list[tuple[int, tuple[str, ...]]]:
        """List the requested rounds later than `after`, each with its sites, from the journal.

        Raises:
            RunError: the journal is damaged.
        """
        try:
            lines = map(json.loads, self._complete_lines())
            rounds = [decode_value("asked", line, tuple[int, tuple[str, ...]]) for line in lines]
            return [(round, sites) for round, sites in rounds if round > after]
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"the journal {self._asked} is damaged; restore it from a backup, since requested rounds are unknown"
            ) from error

    def save(self, state: LeadState) -> None:
        """Write a checkpoint of `state` and delete old checkpoints.

        The write is atomic: after a crash, the previous checkpoint is intact.
        """
        best = None if state.best is None else state.best.tensors
        arrays = {
            "adapter": state.adapter.tensors,
            "best": best or {},
            "strategy": state.strategy,
            "algorithm": state.algorithm,
        }
        tensors = {f"{key}/{name}": np.asarray(value) for key, named in arrays.items() for name, value in named.items()}
        about = {"config_sha256": self._config, **{key: list(named) for key, named in arrays.items()}}
        about |= {name: getattr(state, name) for name in _list_non_array_fields()}
        metadata = {
            "fedtune": json.dumps(about, default=lambda one: one.to_json() if isinstance(one, Receipt) else asdict(one))
        }
        write_durably(self._folder / format_checkpoint_name(state.round), save_tensors(tensors, metadata=metadata))
        for old in list_checkpoints(self._folder)[:-_MAX_CHECKPOINTS]:
            old.unlink()

    def load(self) -> LeadState:
        """Load the newest checkpoint and count every later requested round as unanswered.

        Raises:
            ConfigError: there is no checkpoint, or it belongs to another configuration.
            StuckError: the newest checkpoint is damaged.
        """
        paths = list_checkpoints(self._folder)
        if not paths:
            raise ConfigError("resume", str(self._folder.parent), "has no checkpoint: start a new run")
        data = read_regular_file(paths[-1])
        try:
            tensors = load_tensors(data)
            size = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedtune"])
            other = about["config_sha256"] != self._config
            arrays = {key: {name: tensors[f"{key}/{name}"] for name in about[key]} for key in _ARRAY_FIELDS}
            state = LeadState(
                adapter=Adapter(arrays["adapter"]),
                best=Adapter(arrays["best"]) if arrays["best"] else None,
                strategy=arrays["strategy"],
                algorithm=arrays["algorithm"],
                **{name: decode_value(name, about[name], hint) for name, hint in _list_non_array_fields().items()},
            )
            check_at_least("rounds", min(state.round, *state.unanswered.values(), 0), 0)
        except Exception as error:
            raise StuckError(f"checkpoint {paths[-1]} is damaged: {error}; {_explain_recovery(paths)}") from error
        if other:
            raise ConfigError("resume", str(self._folder.parent), "has a checkpoint of a different configuration")
        for _, sites in self.list_requests(after=state.round):
            state = state.with_requests_to(sites)
        return state

    def _complete_lines(self) -> list[bytes]:
        """Read the complete lines of the journal.

        A crash can truncate the last line, but only before any request of its round is sent.
        """
        lines = read_regular_file(self._asked).splitlines(keepends=True) if self._asked.exists() else []
        return [line for line in lines if line.endswith(b"\n")]


def _explain_recovery(paths: Sequence[Path]) -> str:
    """Return the advice for recovering from a damaged newest checkpoint.

    A run resumed from the previous checkpoint repeats the requests of the later rounds, which are not charged again.
    """
    if len(paths) < 2:
        return "there is no earlier checkpoint: start a new run under another name"
    return f"move it away, and resume the run from {paths[-2].name}"


def _list_non_array_fields() -> Mapping[str, Any]:
    """Return the names and types of the `LeadState` fields that contain no arrays."""
    hints = get_type_hints(LeadState)
    return {name: hint for name, hint in hints.items() if name not in _ARRAY_FIELDS}


@dataclass(frozen=True, slots=True)
class AggregationResult:
    """Result of aggregating one round.

    Attributes:
        adapter: the new adapter.
        sites: the sites with an update in the aggregate.
        failures: site -> the reason why its update is not included.
        strategy: the state of the server optimizer, for a checkpoint.
    """

    adapter: Adapter
    sites: tuple[str, ...]
    failures: Mapping[str, str]
    strategy: Arrays


class Aggregation(Protocol):
    """Interface of the lead's aggregation rule, plain or secure, which combines a round's updates into the next
    adapter.

    The counterpart at a site is `_protect` in `site_round.py`.

    Attributes:
        session: the name of the current secure aggregation session; empty for plain averages.
        left_out: the sites excluded from all further rounds.
    """

    @property
    def session(self) -> str: ...

    @property
    def left_out(self) -> Collection[str]: ...

    def resume(self, state: LeadState) -> LeadState:
        """Prepare the first round, or recover from an interruption; return the state to continue from."""

    def prepare(self) -> Sequence[str]:
        """Choose the sites of the next round before any site is charged; raise RunError if there are too few."""

    def combine(self, state: LeadState, replies: RoundReplies) -> AggregationResult:
        """Combine a round's valid updates into the next adapter; raise RunError if the run cannot continue."""

    def restore(self, strategy: Arrays) -> None:
        """Restore an earlier state of the server optimizer."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The lead of one run: the proposed run, the public settings, and the callbacks of the round loop."""

    asked: ProposedRun  # the proposal, the sites and the lead's key
    training: TrainingSpec  # the sites' training settings, which bound the distance of an update from the sent adapter
    lora: LoraSpec  # the LoRA settings, which determine the frozen tensors of a round
    declared_sizes: Mapping[str, int]  # site -> its declared size; the weights of the average
    average: Aggregation  # the aggregation rule for plain updates
    checkpoints: Checkpoints
    evaluate: Callable[[Adapter], Mapping[str, float]]  # scores an adapter on the lead's own validation data
    finished: Callable[[LeadState], None]  # called with the state after each round
    elapsed: Callable[[], float]  # seconds since the start of the run, without interruptions
    # site -> its newest receipt from earlier runs, sent back until this run has a receipt
    earlier_receipts: Mapping[str, Receipt] = field(default_factory=dict)
    gives_adapter: bool = False  # whether the sites receive the final adapter
    primary_metric: str = "loss"  # the metric for early stopping and checkpoint selection

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.asked.proposal.run

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.asked.proposal.plan
