"""Python API for a site's privacy ledger, which does not import any machine-learning framework.

A release outside of fedtune's runs is charged like a run of one round.  The charge is a signed event in the ledger's
hash chain, counts towards the same caps as all runs, and is written before the release's value is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.api.memory import convert_cell
from fedtune.codec import require
from fedtune.data.values import is_missing, read_value
from fedtune.extras import require_extra
from fedtune.formatting import format_html_table
from fedtune.privacy.accountant import check_noise, format_epsilon
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.privacy.mechanism import Noise, Unit
from fedtune.privacy.own_release import propose_release, release_sum
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.randomness import SystemRandomness
from fedtune.privacy.release import Reason, Receipt, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Asserted, Budget, Dataset, ReferenceRun
from fedtune.spec import (
    NOT_GIVEN,
    ConfigError,
    RefusedError,
    RunError,
    check_at_least,
    check_name,
    check_positive,
    check_whole,
)
from fedtune.version import find_config_folder

if TYPE_CHECKING:
    import pandas

    from fedtune.report.facts import Lifetime

_QUERIES = ReferenceRun(sampling_rate=1.0, noise_multiplier=10.0, steps=1)  # noise does not change the best order
_OTHER_SETTINGS = "was charged with other settings: choose another name"
_LOST = "was charged, but its result was lost in a crash: choose another name"
_NAME_IS_USED = {
    Reason.PLAN_CHANGED: _OTHER_SETTINGS,
    Reason.ROUND_REQUESTED_DIFFERENTLY: _OTHER_SETTINGS,
    Reason.PLAN_EXHAUSTED: _LOST,
    Reason.RUN_ENDED: _LOST,
}
_ABOUT_TOTALS = (Reason.MAX_EPSILON, Reason.MAX_EPSILON_PER_PERIOD)
"""Reasons of refusals by a cap on the total epsilon.  Their `asked` is the total epsilon including the release."""


class Ledger:
    """A site's privacy ledger, verified on opening.

    `Ledger(path)` is read-only; `Ledger.open` and `Ledger.create` return a ledger that can charge releases.

    Guarantee: nobody without the site's key changed, deleted, inserted or reordered an event.  Removal of the latest
    events is detected only by an anchor (`fedtune ledger verify --anchor`).  The total of all charges, by runs and by
    this class, stays within the policy's caps (docs/site_policy.md).

    Args:
        path: the ledger.db file.
        site_key: the site's public key (hex) from a trusted source.  Default: the key in the ledger.

    Raises:
        ValueError: the file does not exist.
        RunError: the verification failed; the message names the check.
    """

    def __init__(self, path: str | Path, *, site_key: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError("ledger", str(path), "must be a ledger.db")
        self._verified: VerifiedLedger | None = verify(self.path, site_key=site_key)
        self._site_key = self._verified.site_key
        self._opened: SiteLedger | None = None

    @classmethod
    def open(cls, site_toml: str | Path, *, create: bool = False) -> Ledger:
        """Open a site's ledger for charging.

        Args:
            site_toml: the site's policy, which contains the paths of the ledger and the key.
            create: begin a new ledger, with a new key if the site has none, if the ledger is missing.  Without it, a
                lost ledger is an error, not a new budget.

        Raises:
            ValueError: the policy, the key or the ledger cannot be used.
            RunError: the ledger is damaged, was modified or rolled back, or cannot be written.
        """
        files = SiteFiles.from_site_toml(Path(site_toml))
        opened = files.open_ledger(create=create)
        ledger = cls(files.ledger)
        ledger._opened = opened
        return ledger

    @classmethod
    def create(
        cls, folder: str | Path, *, epsilon: float, delta: float, size: int, unit: Unit = "record", site: str = "site"
    ) -> Ledger:
        """Create a policy, a key (mode 0600) and a ledger in a folder, and open the ledger for charging.

        The policy is the template of `fedtune site template` with these values.  It permits no lead to train, and its
        accounting is tuned for queries.  For any other policy, write a site.toml, and use `Ledger.open` with
        `create=True`.

        Args:
            folder: the folder for the three files.
            epsilon: lifetime cap on the privacy loss of all releases about these records.
            delta: delta of the cap; cannot be changed later.
            size: the declared size: a public, rounded number of units instead of the exact number.
            unit: unit of privacy, "record" or "user"; cannot be changed later.
            site: name of the site; cannot be changed later.

        Raises:
            ValueError: a value is out of range, or the folder already contains a policy or a ledger.
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
            bound = f"already contains {path.name}: open the ledger with fedtune.Ledger.open"
            require("folder", str(folder), not path.exists(), bound)
        write_policy(policy, site_toml)
        return cls.open(site_toml, create=True)

    def charge(
        self,
        name: str,
        *,
        noise_multiplier: float,
        noise: Noise = "gaussian",
        sampling_rate: float = 1.0,
        steps: int = 1,
    ) -> Receipt:
        """Charge a release by other software in advance, and return the site's signed receipt.

        Guarantee: the charge is correct for a mechanism of `steps` sums, each over a Poisson sample of the units and
        with Gaussian noise of standard deviation `noise_multiplier` times the L2 sensitivity, or Laplace noise of
        scale `noise_multiplier` times the L1 sensitivity.  The sensitivity is the largest change of a sum when one
        unit is added or removed.  That the other software implements this mechanism is the caller's responsibility.

        Args:
            name: name of the release.  A name can be charged only once; charge a repeated release under a new name.
            noise_multiplier: ratio of noise to sensitivity, above 0, as in Opacus and jax_privacy.
            noise: "gaussian" or "laplace".
            sampling_rate: probability with which each unit joins a step; below 1 for "gaussian" only.
            steps: number of steps.

        Raises:
            ValueError: a value is out of range, or the name was already charged.
            RefusedError: the charge exceeds a limit of the policy; nothing is charged.
            RunError: the ledger fails verification or cannot be written.
        """
        check_whole("steps", steps)
        check_at_least("steps", steps, 1)
        kind = "dp_sgd" if sampling_rate < 1 or steps > 1 else noise
        how = {"sampling_rate": sampling_rate, "local_steps": steps, "max_grad_norm": 1.0}
        proposal, granted = self._reserve_release(kind, name, [], noise_multiplier=noise_multiplier, noise=noise, **how)
        if not isinstance(granted, Reservation):
            raise ConfigError("name", name, "was already charged: give a repeated release a new name")
        self._commit_reply(granted, b"[]")
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
        """Release a noised count of the units whose value is true.

        The guarantee, arguments and errors are those of `sum` with a bound of 1, except that `values` has one value per
        record: true, false, 1 or 0; a missing value counts as false.
        """
        selected = self._select_one_value_per_unit(values, users)
        with _convert_values("must contain one true or false value per record"):
            rows = [(_read_mark(value),) for value in selected]
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
        """Release a noised histogram: the number of units per value of `bins`.

        Every unit is in at most one bin, so the sensitivity is 1; empty bins are noised as well.  The guarantee is
        that of `sum` with a bound of 1.

        Args:
            name: name of the release.
            values: one value per record; values outside of `bins` are not counted.
            bins: distinct values, chosen independently of the records.
            noise_multiplier: ratio of noise to sensitivity, above 0.
            noise: "gaussian" or "laplace".
            users: the user of each record, if the ledger's unit is "user".

        Returns:
            The noised count per bin.

        Raises:
            ValueError: as for `sum`; or a bin or a value is not hashable, or a bin is listed twice.
            RefusedError: the charge exceeds a limit of the policy; nothing is charged.
            RunError: the ledger fails verification or cannot be written.
        """
        wanted = "must contain distinct, hashable values, at least one"
        with _convert_values(wanted, key="bins"):
            require("bins", list(bins), 0 < len(set(bins)) == len(bins), wanted)
        rows, none = {bin: tuple(float(bin == other) for other in bins) for bin in bins}, (0.0,) * len(bins)
        selected = self._select_one_value_per_unit(values, users)
        with _convert_values("must contain one hashable value per record"):
            found = [rows.get(value, none) for value in selected]
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
        """Release a noised sum of one number, or of one row of numbers, per unit.

        Guarantee: one Gaussian or Laplace mechanism over all units, charged before its noise is drawn.  Rows with a
        norm above `bound` are clipped, values that are not finite count as 0, and sums and noise are integers
        (`privacy.own_release`).  The result is stored before it is returned:
        a repeated call with the same name and settings returns the stored result, even if the records have changed,
        and charges nothing.  If the process crashes before the result is stored, the release stays charged and its
        name cannot be used again.

        Args:
            name: name of the release.
            values: one number per record; or one row of numbers per record, as a two-dimensional array or a DataFrame,
                whose number of columns does not depend on the records.
            bound: clipping norm per unit: L2 norm for "gaussian", L1 norm for "laplace".
            noise_multiplier: standard deviation (gaussian) or scale (laplace) of the noise divided by `bound`; above 0.
            noise: "gaussian" or "laplace".
            users: the user of each record, if the ledger's unit is "user": a text or a whole number, normalized as in
                training.  Only the last record of a user counts, and records without a user are not used.

        Returns:
            The noised sum of each column.

        Raises:
            ValueError: a value is out of range, or the records are not numeric; nothing is charged.
            RefusedError: the charge exceeds a limit of the policy; nothing is charged.
            RunError: the ledger fails verification or cannot be written.
        """
        check_positive("bound", bound)
        # The width must not depend on the records: the rows of a list would have none if there is no record.
        wanted = "must be numbers, or an array or DataFrame with rows of equally many numbers"
        shape: tuple[int, ...] = getattr(values, "shape", (0,))
        require("values", NOT_GIVEN, len(shape) == 1 or (len(shape) == 2 and shape[1] > 0), wanted)
        width = shape[1] if len(shape) == 2 else 1
        selected = self._select_one_value_per_unit(values, users)
        with _convert_values(wanted):
            found = np.asarray(selected)
            require("values", NOT_GIVEN, found.dtype.kind in "biufO", wanted)  # neither texts, times nor complex
            table = found.astype(np.float64).reshape(len(selected), width)
        rows = list(map(tuple, table.tolist()))
        planned = {"noise_multiplier": noise_multiplier, "noise": noise, "max_grad_norm": bound}
        return self._release_sum("sum", name, rows, range(width), **planned)

    def receipt(self, name: str) -> Receipt:
        """Sign a receipt for the charges of a release or run.

        Args:
            name: the name of the release, with or without its kind as a prefix ("count over-65" or "over-65"), or the
                name of a run; `spending.runs` lists all of them.

        Raises:
            ValueError: the name is unknown, or is ambiguous without the kind.
        """
        runs = self._site.history.runs
        found = [name] if name in runs else [run for run in runs if run.partition(" ")[2] == name]
        known = f": {', '.join(runs)}" if runs else "; nothing was charged yet"
        require("name", name, bool(found), f"must be the name of a release or run of this ledger{known}")
        require("name", name, len(found) == 1, f"is ambiguous: choose one of {', '.join(found)}")
        return self._site.sign_receipt(found[0])

    @property
    def verified(self) -> VerifiedLedger:
        """The ledger's verified events and their history, reread and verified again after every charge.

        Raises:
            RunError: the verification failed.
        """
        if self._verified is None:
            self._verified = verify(self.path, site_key=self._site_key)
        return self._verified

    @property
    def spending(self) -> Lifetime:
        """Epsilon spent over the ledger's lifetime, in the current period and by each run, computed from its events."""
        from fedtune.report.from_ledger import compute_lifetime_budget

        return compute_lifetime_budget(self.verified)

    def _repr_html_(self) -> str:
        spent, left = self.spending, self.spending.remaining_epsilon
        rows = {"epsilon over its lifetime": format_epsilon(spent.epsilon), "runs": len(spent.runs)}
        rows |= {"left": "no limit" if left is None else f"{left:.3f}", "events": len(self.verified.events)}
        return format_html_table(f"Ledger {self.path}", rows.items())

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with one row per event: time, kind, run and round."""
        columns = ("sequence", "time", "kind", "run", "round")
        return to_data_frame(self.verified.events, columns, lambda one: {"kind": str(one.kind)})

    @property
    def _site(self) -> SiteLedger:
        if self._opened is None:
            raise ConfigError("ledger", str(self.path), "is read-only: use fedtune.Ledger.open(site.toml) to charge it")
        return self._opened

    def _select_one_value_per_unit(self, values: Any, users: Iterable[Hashable] | None) -> list[Any]:
        """Return one value per privacy unit: each record's value, or each user's last value for unit "user"."""
        by_user = self._site.policy.population.unit == "user"
        bound = "must contain the user of each record for a ledger with unit = user, and be omitted for unit = record"
        require("users", NOT_GIVEN, by_user is (users is not None), bound)
        with _convert_values("must be an iterable of one value per record"):
            # of a DataFrame, the rows instead of the columns
            each = list(values.to_numpy() if hasattr(values, "to_numpy") else values)
        if users is None:
            return each
        with _convert_values("must contain one id per record, a text or a whole number", key="users"):
            ids = [convert_cell(one, at="users") for one in users]
            known = [(one, own) for one, own in zip(ids, each, strict=True) if not is_missing(one)]
            return list({read_value(one, "user", at="users"): own for one, own in known}.values())

    def _release_sum(
        self, kind: str, name: str, rows: Sequence[tuple[float, ...]], columns: Sequence[Hashable], **planned: Any
    ) -> list[float]:
        """Charge, compute and store a noised sum, or return the stored result of an earlier identical call."""
        proposal, reply = self._reserve_release(kind, name, columns, **planned, sampling_rate=1.0, local_steps=1)
        if isinstance(reply, Reservation):
            answer = release_sum(rows, proposal.plan, width=len(columns), stream=SystemRandomness().stream())
            reply = self._commit_reply(reply, json.dumps(answer).encode())
        return [float(value) for value in json.loads(reply)]

    def _reserve_release(
        self, kind: str, name: str, columns: Sequence[Hashable], **planned: Any
    ) -> tuple[Proposal, Reservation | bytes]:
        check_name("name", name)
        check_noise("noise_multiplier", planned["noise_multiplier"])
        proposal = propose_release(kind, name, self._site.policy, **planned)
        # The columns are part of the request: a stored result must not be returned under other column names.
        request = hashlib.sha256(repr((proposal.digest(), list(columns))).encode()).hexdigest()
        self._verified = None  # read again, also after an interrupt
        try:
            return proposal, self._site.reserve(proposal, round=1, request=request, own=True)
        except OSError as error:
            raise RunError(f"{error}; nothing was charged") from error
        except Refused as refused:
            if (bound := _NAME_IS_USED.get(refused.reason)) is not None:
                raise ConfigError("name", name, bound) from refused
            reason = str(refused)
            if refused.reason in _ABOUT_TOTALS:
                reason = f"{refused.reason}: epsilon would be {refused.requested} in total, {refused.allowed}"
            text = f"the release {proposal.run!r} exceeds the budget: {reason}; nothing was charged"
            why = self._site.explain_refusal(refused)
            raise RefusedError(f"{text}: {why}" if why else text) from refused

    def _commit_reply(self, granted: Reservation, reply: bytes) -> bytes:
        self._site.commit(granted, reply)
        self._site.end_run(granted.run)
        return reply


@contextmanager
def _convert_values(bound: str, *, key: str = "values") -> Iterator[None]:
    """Turn errors of a conversion into a ConfigError, which does not quote the records."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError):  # ArithmeticError: an integer beyond the range of a float
        raise ConfigError(key, NOT_GIVEN, bound) from None


def _read_mark(value: object) -> float:
    """Read a value of `Ledger.count`: 1.0 for true, 0.0 for false or a missing value."""
    mark = convert_cell(value, at="values")
    if mark not in (None, False, True):
        raise ValueError("neither true nor false")
    return float(mark or 0)


def to_data_frame(
    rows: Sequence[object], columns: Sequence[str], other: Callable[[Any], dict[str, Any]]
) -> pandas.DataFrame:
    """Build a data frame from objects.

    Args:
        rows: objects, one per row.
        columns: attributes that become columns; the first is the index.
        other: function that returns additional columns of a row.
    """
    require_extra("to_frame", NOT_GIVEN, "notebook", "pandas")
    import pandas

    made = [{name: getattr(one, name) for name in columns} | other(one) for one in rows]
    return pandas.DataFrame(made, columns=None if made else columns).set_index(columns[0])
