"""Two reports beside each other: what changed in settings, privacy, utility and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from fedtune.report.model import Audit, Mechanism, Report, SiteReport
from fedtune.spec import ConfigError

Group = Literal["settings", "privacy", "utility", "cost"]
GROUPS: tuple[Group, ...] = ("settings", "privacy", "utility", "cost")
Value = str | float | bool | None
Figures = dict[str, Value]
_MECHANISM = (
    "sampling_assumed",
    "sampling_run",
    "sampling_rate",
    "noise_multiplier",
    "max_grad_norm",
    "local_steps",
    "metrics_noise_multiplier",
    "records_per_user",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that differs.

    Attributes:
        key: dotted, as in `report.json` where it stands there.
        before: in the first report; None also where it has no such thing, and for an epsilon that nothing bounds.
        after: in the second, likewise.
        missing: the report that has no such key, if one has none.
    """

    group: Group
    key: str
    before: Value
    after: Value
    missing: Literal["before", "after"] | None = None


def differences(
    before: Report, after: Report, *, settings: tuple[Mapping[str, object], Mapping[str, object]] = ({}, {})
) -> tuple[Change, ...]:
    """What differs between two reports of one kind, group by group.

    Args:
        before: the first report.
        after: the second.
        settings: of both runs, where their configurations are at hand: a report holds only the hash.

    Raises:
        ConfigError: a run's report and a ledger's cannot be compared.
    """
    if before.kind != after.kind:
        raise ConfigError("kind", after.kind, f"must be that of the first report, {before.kind}")
    configurations = [{f"config.{key}": value for key, value in _flat(one)} for one in settings]
    pairs: tuple[tuple[Group, Figures, Figures], ...] = (
        ("settings", _settings(before) | configurations[0], _settings(after) | configurations[1]),
        ("privacy", _privacy(before), _privacy(after)),
        ("utility", _utility(before), _utility(after)),
        ("cost", _cost(before), _cost(after)),
    )
    return tuple(change for group, old, new in pairs for change in _changes(group, old, new))


def _changes(group: Group, old: Figures, new: Figures) -> Iterator[Change]:
    for key in [*old, *(key for key in new if key not in old)]:
        missing: Literal["before", "after"] | None = "before" if key not in old else "after" if key not in new else None
        if missing or old[key] != new[key]:
            yield Change(group=group, key=key, before=old.get(key), after=new.get(key), missing=missing)


def _settings(report: Report) -> Figures:
    """What was chosen, and what it ran on."""
    fields = ("name", "unit", "neighbouring_relation", "delta", "target_epsilon", "seeded_noise", "randomness")
    found: Figures = {key: getattr(report, key) for key in fields}
    for key in ("released", "covers", "leaves_out"):
        found[key] = ", ".join(getattr(report, key))
    found |= {f"provenance.{key}": value for key, value in _flat(asdict(report.provenance))}
    for site in report.sites:
        found[f"sites.{site.site}.declared_size"] = site.declared_size
        for row in site.mechanisms:
            found |= {f"{_row(report, site, row)}.{key}": getattr(row, key) for key in _MECHANISM}
    return found


def _privacy(report: Report) -> Figures:
    """What was spent, what it means, and whether it was allowed."""
    found: Figures = {
        "verdict.state": report.verdict.state,
        "verdict.reasons": ", ".join(report.verdict.reasons),
        "epsilon": report.epsilon,
    }
    for site in report.sites:
        where = f"sites.{site.site}"
        found |= {f"{where}.verdict.state": site.verdict.state, f"{where}.source": site.source}
        for key in ("approved", "spent"):
            found |= {f"{where}.{name}": value for name, value in _flat({key: _fields(getattr(site, key))})}
        if site.lifetime:
            names = (
                "with_set_aside",
                "left",
                "period_epsilon",
                "reference_runs_left",
                "frozen",
                "in_doubt",
                "restored",
            )
            found |= {f"{where}.lifetime.{name}": getattr(site.lifetime, name) for name in names}
        if site.meaning:
            meant = ("right_of_100_ceiling", "right_of_100_mechanism", "expected_failures")
            found |= {f"{where}.meaning.{name}": getattr(site.meaning, name) for name in meant}
        for row in site.mechanisms:
            found[f"{_row(report, site, row)}.rounds"] = row.rounds
    found |= {f"assumptions.{one.code}": one.status for one in report.assumptions}
    if report.audit:
        found |= dict(_audit(report.audit))
    return found


def _audit(audit: Audit) -> Iterator[tuple[str, Value]]:
    yield from (("audit.method", audit.method), ("audit.confidence", audit.confidence))
    for bound in audit.bounds:
        where = f"audit.{bound.site or 'all_sites'}"
        yield from ((f"{where}.{key}", getattr(bound, key)) for key in ("lower_bound", "best_possible", "canaries"))
    for attack in audit.membership:
        yield f"audit.{attack.site or 'all_sites'}.{attack.score}.auroc", attack.auroc


def _utility(report: Report) -> Figures:
    """Scores before and after."""
    utility = report.utility
    if utility is None:
        return {}
    groups = {"before": utility.before, "final": utility.final, "non_private": utility.non_private or {}}
    return dict(_flat(groups))


def _cost(report: Report) -> Figures:
    """Sums over the rounds of a run."""
    if report.utility is None:
        return {}
    rounds = report.utility.rounds
    return {
        "rounds": len(rounds),
        "seconds": math.fsum(one.seconds for one in rounds),
        "bytes_down": sum(one.bytes_down for one in rounds),
        "bytes_up": sum(one.bytes_up for one in rounds),
        "sites_that_failed": sum(len(one.failed_sites) for one in rounds),
    }


def _row(report: Report, site: SiteReport, row: Mechanism) -> str:
    """A run's report has one row for a site, whose run is called otherwise in every report."""
    one_run = report.kind == "run" and len(site.mechanisms) == 1
    return f"sites.{site.site}.mechanism" if one_run else f"sites.{site.site}.runs.{row.run}"


def _fields(part: object) -> Mapping[str, object]:
    return {} if part is None else asdict(part)  # type: ignore[call-overload]


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Nested mappings as dotted keys; what is listed stands in one text."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            assert value is None or isinstance(value, str | float | int), key
            yield f"{prefix}{key}", value
