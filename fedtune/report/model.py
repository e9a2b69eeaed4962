"""A privacy report as data: what `report.json` holds, and what pages are made of.

It is the same in every language: codes, figures and names, no sentences.  Every epsilon is an upper bound; None says
that nothing bounds it.  Times are UTC in ISO form, of the run or the ledger, so that one input gives one report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedtune.report.audit_record import Audit
from fedtune.report.site_model import SiteReport, Verdict
from fedtune.spec import ConfigError, spec

SCHEMA_VERSION = 2
Scores = Mapping[str, float | None]


@spec
class Assumption:
    """Something that the guarantee rests on; `evidence` names a test, a log or who asserts it."""

    code: str
    status: Literal["violated", "assumed", "asserted", "verified"]
    evidence: str


@spec
class RoundCost:
    """What a round took, and how well the adapter did after it; exact figures of the lead's own."""

    round: int
    sites: tuple[str, ...]
    failed_sites: Mapping[str, str]
    seconds: float
    bytes_down: int
    bytes_up: int
    scores: Scores
    epsilon: float | None


@spec
class Utility:
    """Scores on the lead's own files: exact, and covered by no guarantee."""

    before: Scores
    final: Scores
    non_private: Scores | None
    rounds: tuple[RoundCost, ...]


@spec
class Provenance:
    """What the run was made of; None: not known."""

    fedtune_version: str
    config_sha256: str | None
    model: str | None
    model_sha256: str | None
    model_licence: str | None
    dataset: str | None
    task: str | None
    libraries: Mapping[str, str]
    python: str | None
    machine: str | None


@spec
class Cell:
    """A field of an impact assessment or of technical documentation, and who fills it."""

    code: str
    state: Literal["auto", "design", "site", "missing"]
    facts: Mapping[str, str]


@spec
class Signature:
    """An Ed25519 signature over everything else in the report."""

    key: str
    signature: str


@spec
class Report:
    """A run as its lead knows it, or a ledger as its site does; `released` and the other tuples of texts are codes."""

    kind: Literal["run", "ledger"]
    name: str
    date: str | None
    verdict: Verdict
    unit: str
    neighbouring_relation: str
    delta: float
    epsilon: float | None
    target_epsilon: float | None
    seeded_noise: bool
    randomness: str
    released: tuple[str, ...]
    sites: tuple[SiteReport, ...]
    covers: tuple[str, ...]
    leaves_out: tuple[str, ...]
    not_protected: tuple[str, ...]
    unprotected_figures: tuple[str, ...]
    assumptions: tuple[Assumption, ...]
    cells: tuple[Cell, ...]
    provenance: Provenance
    utility: Utility | None = None
    audit: Audit | None = None
    signature: Signature | None = None
    schema_version: Literal[2] = 2


def finite(metrics: Scores) -> Scores:
    """A model that diverged may have a loss that is no number; JSON has no word for it but null."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()}


_ADAPTER = TypeAdapter(Report)


def to_json(report: Report) -> dict[str, Any]:
    """Plain JSON; `from_json` gives the report back."""
    return dict(_ADAPTER.dump_python(report, mode="json"))


def from_json(text: str | bytes) -> Report:
    """The report in a `report.json`.

    Raises:
        ConfigError: it is none of this version.
    """
    try:
        return _ADAPTER.validate_json(text, strict=True)  # strict: "1" and true are no numbers
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "report"
        raise ConfigError(
            where, first["type"], f"is no report of schema version {SCHEMA_VERSION}: {first['msg']}"
        ) from None


def json_schema() -> dict[str, Any]:
    """The published schema."""
    return _ADAPTER.json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedtune report",
    }


def schema_text() -> str:
    """The schema as it is published."""
    return json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"
