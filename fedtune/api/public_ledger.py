"""A ledger from Python: it is read, and charges any release; no machine-learning framework is imported.

What a site releases beside fedtune's runs is charged like a run of one round: before its value exists, against the same
caps, in the same signed events.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.codec import require
from fedtune.extras import require_extra
from fedtune.formatting import format_html_table
from fedtune.privacy.accountant import check_noise, format_epsilon
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import Verified, verify
from fedtune.privacy.mechanism import Noise, Unit
from fedtune.privacy.own_release import propose_release, release_sum
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.randomness import SystemRandomness
from fedtune.privacy.release import Reason, Receipt, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Asserted, Budget, Dataset, ReferenceRun
from fedtune.spec import NOT_GIVEN, ConfigError, RefusedError, check_at_least, check_name, check_positive, check_whole
from fedtune.version import find_config_folder

if TYPE_CHECKING:
    import pandas

    from fedtune.report.facts import Lifetime

_QUERIES = ReferenceRun(sampling_rate=1.0, noise_multiplier=10.0, steps=1)  # the same order is best for any noise
_OTHER_SETTINGS = "was charged with other settings: choose another name"
_LOST = "was charged, but its answer was lost in a crash: choose another name"
_NAME_IS_USED = {
    Reason.PLAN_CHANGED: _OTHER_SETTINGS,
    Reason.ROUND_REQUESTED_DIFFERENTLY: _OTHER_SETTINGS,
    Reason.PLAN_EXHAUSTED: _LOST,
    Reason.RUN_ENDED: _LOST,
}
_ABOUT_TOTALS = (Reason.MAX_EPSILON, Reason.MAX_EPSILON_PER_PERIOD)
"""Caps on a total: such a refusal asks for what would be spent in all, not for the release alone."""


class Ledger:
    """A site's ledger, verified: `Ledger(path)` reads it, `Ledger.open` and `Ledger.create` also charge releases.

    Guarantee: nobody without the site's key changed, deleted, inserted or reordered an event.  Only an anchor shows
    that no event is missing at the end: `fedtune ledger verify --anchor`.  All that was charged here or by runs stays
    within the policy's caps (docs/any_release.md).

    Args:
        path: the ledger.db file.
        site_key: the site's public key in hex, from a trusted source; None: the key that the ledger names.

    Raises:
        ValueError: there is no such file.
        RunError: the verification failed; the message says which check.
    """

    def __init__(self, path: str | Path, *, site_key: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError("ledger", str(path), "must be a ledger.db")
        self._verified: Verified | None = verify(self.path, site_key=site_key)
        self._site_key = self._verified.site_key
        self._opened: SiteLedger | None = None

    @classmethod
    def open(cls, site_toml: str | Path) -> Ledger:
        """Open the ledger that a site's policy names for charging; a missing ledger or key is created.

        Raises:
            ValueError: the policy, the key or the ledger cannot be used.
            RunError: the ledger is damaged, was changed or put back, or cannot be written.
        """
        files = SiteFiles.from_site_toml(Path(site_toml))
        opened = files.open_ledger()
        ledger = cls(files.ledger)
        ledger._opened = opened
        return ledger

    @classmethod
    def create(
        cls, folder: str | Path, *, epsilon: float, delta: float, size: int, unit: Unit = "record", site: str = "site"
    ) -> Ledger:
        """Create a site's policy, key (mode 0600) and ledger in a folder, and open the ledger for charging.

        The policy is the template's (`fedtune site template`), under which no lead may train, with these values; the
        accounting is chosen for queries.  For another policy, write it, and use `Ledger.open`.

        Args:
            folder: for the three files.
            epsilon: cap on everything that is ever released about these records.
            delta: of that cap; fixed for good.
            size: the number of units that the site publishes: a round number, not the exact one.
            unit: what one (epsilon, delta) protects, "record" or "user"; fixed for good.
            site: name of the site; fixed for good.

        Raises:
            ValueError: a value is out of range, or the folder has a policy or a ledger.
        """
        site_toml = Path(folder) / "site.toml"
        policy = read_policy(find_config_folder() / "site.toml")
        policy = replace(
            policy,
            site=site,
            population=replace(policy.population, name="population", unit=unit),
            dataset=(Dataset(id="records", declared_size=size),),
            budget=Budget(delta=delta, max_epsilon=epsilon, reference=_QUERIES),
            asserted=Asserted(no_person_at_another_site=False),
            anchor="",
        )
        for path in (site_toml, site_toml.parent / policy.ledger):
            require("folder", str(folder), not path.exists(), f"has {path.name}: open it with fedtune.Ledger.open")
        write_policy(policy, site_toml)
        return cls.open(site_toml)

    def charge(
        self,
        name: str,
        *,
        noise_multiplier: float,
        noise: Noise = "gaussian",
        sampling_rate: float = 1.0,
        steps: int = 1,
    ) -> Receipt:
        """Charge a release that other software makes, before it is made, and return the site's signed receipt.

        Guarantee: the price alone: that the mechanism is as described is the caller's statement.  `steps` steps, each
        on a Poisson sample (or on all units at a rate of 1), whose noise has a standard deviation of `noise_multiplier`
        times the L2 sensitivity or, for "laplace", a scale of `noise_multiplier` times the L1 sensitivity.  The
        sensitivity is the most that adding or removing one of the ledger's units moves a step's sum.

        Args:
            name: of the release.  It can be charged once: a release that is made again is another one.
            noise_multiplier: as above, and above 0; Opacus and jax_privacy call it so, too.
            noise: "gaussian" or "laplace".
            sampling_rate: probability with which each unit joins a step; below 1 only for "gaussian".
            steps: number of steps.

        Raises:
            ValueError: a value is out of range, or the name was charged before.
            RefusedError: the charge does not fit the policy, which the message names; nothing is charged.
            RunError: the ledger cannot be trusted or written.
        """
        check_whole("steps", steps)
        check_at_least("steps", steps, 1)
        kind = "dp_sgd" if sampling_rate < 1 or steps > 1 else noise
        how = {"sampling_rate": sampling_rate, "local_steps": steps, "max_grad_norm": 1.0}
        proposal, granted = self._reserve(kind, name, [], noise_multiplier=noise_multiplier, noise=noise, **how)
        if not isinstance(granted, Reservation):
            raise ConfigError("name", name, "was charged before: give a repeated release a new name")
        self._commit(granted, b"[]")
        return self.receipt(proposal.run)

    def count(
        self,
        name: str,
        values: Iterable[object],
        *,
        noise_multiplier: float,
        noise: Noise = "gaussian",
        users: Iterable[Hashable] | None = None,
    ) -> float:
        """Release how many units have a true value, with noise; arguments as for `sum`, with a bound of 1."""
        rows = [(float(bool(value)),) for value in self._keep_one_per_unit(values, users)]
        planned = {"noise_multiplier": noise_multiplier, "noise": noise, "max_grad_norm": 1.0}
        return self._release_sum("count", name, rows, ["count"], **planned)[0]

    def histogram(
        self,
        name: str,
        values: Iterable[Hashable],
        bins: Sequence[Hashable],
        *,
        noise_multiplier: float,
        noise: Noise = "gaussian",
        users: Iterable[Hashable] | None = None,
    ) -> dict[Hashable, float]:
        """Release how many units have each value of `bins`, with noise; arguments as for `sum`, with a bound of 1.

        A unit is in one bin, or in none, so that its sensitivity is 1.  The bins must be known without the records; a
        bin without a unit gets its noise, too.
        """
        require("bins", list(bins), 0 < len(set(bins)) == len(bins), "must have at least one value, and no value twice")
        rows, none = {bin: tuple(float(bin == other) for other in bins) for bin in bins}, (0.0,) * len(bins)
        found = [rows.get(value, none) for value in self._keep_one_per_unit(values, users)]
        planned = {"noise_multiplier": noise_multiplier, "noise": noise, "max_grad_norm": 1.0}
        sums = self._release_sum("histogram", name, found, bins, **planned)
        return dict(zip(bins, sums, strict=True))

    def sum(
        self,
        name: str,
        values: Iterable[Any],
        *,
        bound: float,
        noise_multiplier: float,
        noise: Noise = "gaussian",
        users: Iterable[Hashable] | None = None,
    ) -> list[float]:
        """Release the sum of one number or row of numbers per unit, with noise: a value for each column.

        Guarantee: one mechanism of the noise multiplier on all units, charged before its noise is drawn.  A row beyond
        `bound` is scaled down to it, a value that is not finite counts as 0, and sums and noise are whole numbers
        (`privacy.own_release`).  The answer is stored before it is returned: asked again under the same name with the
        same settings, the ledger returns it, whatever the records are by then, and charges nothing.  After a crash in
        between the release stays charged, and its name is used up.

        Args:
            name: of the release.
            values: a number or a row of numbers for each record.
            bound: the most that one unit may add: L2 norm for "gaussian" noise, L1 norm for "laplace".
            noise_multiplier: standard deviation (gaussian) or scale (laplace) of the noise over the bound; above 0.
            noise: "gaussian" or "laplace".
            users: of a ledger with the unit "user", whose each record is: the last record of each user counts.

        Raises:
            ValueError: a value is out of range, or the records are no numbers; nothing is charged.
            RefusedError: the charge does not fit the policy, which the message names; nothing is charged.
            RunError: the ledger cannot be trusted or written.
        """
        check_positive("bound", bound)
        table = np.asarray(self._keep_one_per_unit(values, users), dtype=np.float64)
        width = table.shape[1] if table.ndim == 2 else 1
        rows = list(map(tuple, table.reshape(len(table), width).tolist()))
        planned = {"noise_multiplier": noise_multiplier, "noise": noise, "max_grad_norm": bound}
        return self._release_sum("sum", name, rows, range(width), **planned)

    def receipt(self, name: str) -> Receipt:
        """Sign a receipt for what was charged to a release or run.

        Args:
            name: of the release, as it was given, or of the release or run in `spending.runs`, where a release's kind
                stands before its name ("count over-65").

        Raises:
            ValueError: nothing has this name, or releases of several kinds have it.
        """
        runs = self._site.history.runs
        found = [name] if name in runs else [run for run in runs if run.partition(" ")[2] == name]
        known = f": {', '.join(runs)}" if runs else "; nothing was charged yet"
        require("name", name, bool(found), f"must be the name of a release or run of this ledger{known}")
        require("name", name, len(found) == 1, f"is the name of several releases: choose one of {', '.join(found)}")
        return self._site.sign_receipt(found[0])

    @property
    def verified(self) -> Verified:
        """The verified ledger; after a charge it is verified again when it is next read.

        Raises:
            RunError: the verification failed.
        """
        if self._verified is None:
            self._verified = verify(self.path, site_key=self._site_key)
        return self._verified

    @property
    def spending(self) -> Lifetime:
        """Epsilon spent over the ledger's lifetime, in the current period and by each run, derived from its events."""
        from fedtune.report.from_ledger import compute_current_lifetime

        return compute_current_lifetime(self.verified)

    def _repr_html_(self) -> str:
        spent, left = self.spending, self.spending.left
        rows = {"epsilon over its lifetime": format_epsilon(spent.epsilon), "runs": len(spent.runs)}
        rows |= {"left": "no limit" if left is None else f"{left:.3f}", "events": len(self.verified.events)}
        return format_html_table(f"Ledger {self.path}", rows.items())

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per event: time, kind, run and round."""
        columns = ("sequence", "time", "kind", "run", "round")
        return to_data_frame(self.verified.events, columns, lambda one: {"kind": str(one.kind)})

    @property
    def _site(self) -> SiteLedger:
        if self._opened is None:
            raise ConfigError("ledger", str(self.path), "is read only: fedtune.Ledger.open(site.toml) charges releases")
        return self._opened

    def _keep_one_per_unit(self, values: Any, users: Iterable[Hashable] | None) -> list[Any]:
        """Return one value per unit: all of them or, for unit "user", the last one of each user."""
        by_user = self._site.policy.population.unit == "user"
        bound = "must name the user of each record if the ledger has unit = user, and must be left out otherwise"
        require("users", NOT_GIVEN, by_user is (users is not None), bound)
        each = values.to_numpy() if hasattr(values, "to_numpy") else values  # a DataFrame's rows, not its columns
        return list(each) if users is None else list(dict(zip(users, each, strict=True)).values())

    def _release_sum(
        self, kind: str, name: str, rows: Sequence[tuple[float, ...]], columns: Sequence[Hashable], **planned: Any
    ) -> list[float]:
        """Charge the release of a sum, then add its noise and store the answer; or return the stored answer."""
        proposal, reply = self._reserve(kind, name, columns, **planned, sampling_rate=1.0, local_steps=1)
        if isinstance(reply, Reservation):
            answer = release_sum(rows, proposal.plan, width=len(columns), stream=SystemRandomness().stream())
            reply = self._commit(reply, json.dumps(answer).encode())
        return [float(value) for value in json.loads(reply)]

    def _reserve(
        self, kind: str, name: str, columns: Sequence[Hashable], **planned: Any
    ) -> tuple[Proposal, Reservation | bytes]:
        check_name("name", name)
        check_noise("noise_multiplier", planned["noise_multiplier"])
        proposal = propose_release(kind, name, self._site.policy, **planned)
        # The stored answer is one to these columns alone: asked for others, it would carry their names.
        request = hashlib.sha256(repr((proposal.digest(), list(columns))).encode()).hexdigest()
        try:
            return proposal, self._site.reserve(proposal, round=1, request=request, own=True)
        except Refused as refused:
            if (bound := _NAME_IS_USED.get(refused.reason)) is not None:
                raise ConfigError("name", name, bound) from refused
            said = str(refused)
            if refused.reason in _ABOUT_TOTALS:
                said = f"{refused.reason}: epsilon would be {refused.asked} in total, {refused.allowed}"
            raise RefusedError(
                f"the release {proposal.run!r} exceeds the budget: {said}; nothing was charged"
            ) from refused

    def _commit(self, granted: Reservation, reply: bytes) -> bytes:
        self._site.commit(granted, reply)
        self._site.end_run(granted.run)
        self._verified = None
        return reply


def to_data_frame(
    rows: Sequence[object], columns: Sequence[str], other: Callable[[Any], dict[str, Any]]
) -> pandas.DataFrame:
    """Build a data frame with one row per item, indexed by the first of `columns`; `other` adds more cells to a row."""
    require_extra("to_frame", NOT_GIVEN, "notebook", "pandas")
    import pandas

    made = ({name: getattr(one, name) for name in columns} | other(one) for one in rows)
    return pandas.DataFrame(made).set_index(columns[0])
