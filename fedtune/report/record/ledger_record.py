"""A ledger as its file is: verified where it can be, and read as far as it makes sense where it cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Event, Head
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.verify import Verified, verify
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy
from fedtune.spec import ConfigError, RunError


@dataclass(frozen=True, kw_only=True)
class LedgerRecord:
    """What a ledger says, and whether to believe it.

    Attributes:
        events: in order, as far as they could be followed.
        history: what they add up to.
        verified: None: the ledger does not fit together, or is older than its anchor; `problem` says how.
        problem: empty where it was verified.
        policy_file: the policy in force, where it was given; else what the ledger noted last is all that is known.
    """

    events: tuple[Event, ...]
    history: History
    verified: Verified | None
    problem: str
    policy_file: Policy | None

    @classmethod
    def of(cls, verified: Verified, *, policy_file: Policy | None = None) -> LedgerRecord:
        """The record of a ledger that was verified."""
        events, history = verified.events, verified.history
        return cls(events=events, history=history, verified=verified, problem="", policy_file=policy_file)

    @property
    def policy(self) -> Policy:
        """The newest one that the ledger noted."""
        assert self.history.policy is not None, "a ledger begins with its policy"
        return self.history.policy

    @property
    def in_force(self) -> Policy:
        """The newest policy that the ledger noted, under the smaller of its caps and those of the policy in force.

        A site lowers a cap by writing it down, before the ledger has noted it.  None becomes larger so.
        """
        noted, own = self.policy.budget, self.policy_file.budget if self.policy_file else None
        if own is None:
            return self.policy
        # A cap on another period counts once the ledger has noted it, and until then the noted one does.
        of_period = own if noted.max_epsilon_per_period is None else noted
        most = noted.max_epsilon_per_period
        if of_period.period == own.period:
            most = _smaller(of_period.max_epsilon_per_period, own.max_epsilon_per_period)
        budget = replace(
            noted,
            max_epsilon=min(noted.max_epsilon, own.max_epsilon),
            max_epsilon_per_run=_smaller(noted.max_epsilon_per_run, own.max_epsilon_per_run),
            period=of_period.period,
            max_epsilon_per_period=most,
        )
        return replace(self.policy, budget=budget)

    @property
    def simulated(self) -> bool:
        """Whether the site was ever one of a simulation's."""
        policies = [event.detail["policy"] for event in self.events if event.detail.get("what") == "policy"]
        return any(policy.get("simulated") for policy in policies)

    @property
    def now(self) -> datetime:
        """The time of the newest event: a ledger's figures are as of then, whenever they are read."""
        assert self.history.last_time is not None, "a ledger has events"
        return self.history.last_time


def _smaller(one: float | None, other: float | None) -> float | None:
    """Of two caps; None is no cap."""
    return min((cap for cap in (one, other) if cap is not None), default=None)


def read_ledger(path: Path, *, anchor: Path | None = None) -> LedgerRecord:
    """The record of a `ledger.db`, or of the ledger that a `site.toml` names.

    Args:
        path: of either; with a `site.toml`, its site's key and anchor are used where they are at hand.
        anchor: file that shows that no event is missing.

    Raises:
        ConfigError: there is no such file, it is no policy or anchor, or policy and ledger do not belong together.
        RunError: the ledger cannot be read at all.
    """
    files = SiteFiles.of(path) if path.suffix == ".toml" else None
    ledger = files.ledger if files else path
    if not ledger.is_file():
        raise ConfigError("ledger", str(ledger), "must be a ledger: there is no such file")
    if anchor is None and files and files.anchor and files.anchor.is_file():
        anchor = files.anchor
    head, policy = Head.read(anchor) if anchor else None, files.policy if files else None
    key = SigningKey.load(files.site_key).public if files and files.site_key.is_file() else None
    try:
        record = LedgerRecord.of(verify(ledger, anchor=head, site_key=key), policy_file=policy)
    except RunError as error:
        events, history = _followed(ledger)
        problem = str(error).replace(str(ledger), ledger.name)  # folders are nobody else's business
        record = LedgerRecord(events=events, history=history, verified=None, problem=problem, policy_file=policy)
    for name, made_for, says in record.history.opened.differences(policy) if policy else []:
        raise ConfigError(name, says, f"must be {made_for!r}, for which {ledger} was made").in_file(path)
    return record


def _followed(ledger: Path) -> tuple[tuple[Event, ...], History]:
    """The events up to the first that does not follow, unchecked.

    Raises:
        RunError: not even the first two do, without which nothing is known.
    """
    with store.reading(ledger) as file:
        events = store.read_events(file)
    history = History()
    for number, event in enumerate(events):
        try:
            history.follow(event)
        except RunError:
            if number < 2:
                raise
            return tuple(events[:number]), history
    if len(events) < 2:
        raise RunError(f"ledger {ledger} is empty")
    return tuple(events), history
