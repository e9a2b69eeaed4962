"""A privacy report as data: what `report.json` holds, and what pages are made of.

It is the same in every language: codes, figures and names, no sentences.  Every epsilon is an upper bound; None says
that nothing bounds it.  Times are UTC in ISO form, of the run or the ledger, so that one input gives one report.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import field, fields
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import DataclassSchema

from fedtune.federation.cost import Energy
from fedtune.federation.drift import Fall, HeldOut
from fedtune.federation.kept_round import Kept
from fedtune.federation.lead import Scores
from fedtune.privacy.distributed_noise import Epsilons, SharedNoise
from fedtune.privacy.events import Charge
from fedtune.privacy.selection import Selection
from fedtune.report.facts import Approved, Audit, Facts, Lifetime, Provenance, Release, Source, Verdict, Verification
from fedtune.show.budget_text import Arrivals
from fedtune.spec import REPORT_SCHEMA, ConfigError, check_schema, spec
from fedtune.tasks.measures import Detail

CellState = Literal["auto", "design", "site", "missing"]
Status = Literal["violated", "assumed", "asserted", "ensured", "verified"]
T = TypeVar("T")


def filled(cls: type[T], *sources: object) -> partial[T]:
    """A record's class with every field filled in that a source has under the same name; of several, the first counts.

    Call it with all other fields, and with those in place of which something else stands in the record.
    """
    names = [one.name for one in fields(cls)]  # type: ignore[arg-type]
    found = {name: getattr(one, name) for one in reversed(sources) for name in names if hasattr(one, name)}
    return partial(cls, **found)


@spec
class Spent:
    """What was charged."""

    epsilon: float | None  # the figure that the verdict uses: of a run by PLD, of a ledger by the filter
    epsilon_pld: float | None  # the same charges by PLD
    epsilon_rdp: float | None  # by RDP
    planned_epsilon: float | None  # of the whole plan by PLD; None for a ledger
    upper_bound: bool  # a site fell silent, or its receipts are missing, and every round that may be charged is counted
    rounds: int
    steps: int
    ended_by_scores: bool = False  # the run's scores ended it after some of these charges, and picked the moment


@spec
class Posterior:
    """How sure an attacker can become that a record was used, from epsilon alone."""

    prior: float
    ceiling: float  # no bound for every single outcome: passed with a small chance, which can be many times delta


@spec
class HitRate:
    """Share of used records that an attacker finds at a share of false alarms: at most."""

    false_alarms: float
    ceiling: float
    mechanism: float | None


@spec
class Meaning:
    """What (epsilon, delta) means as frequencies.

    Of 100 guesses whether a record was used, half of which were, at most so many are right.
    """

    right_of_100_ceiling: float  # from (epsilon, delta) alone
    right_of_100_mechanism: float | None  # by the mechanism's own curve
    posterior: tuple[Posterior, ...]
    hit_rates: tuple[HitRate, ...]
    expected_failures: float | None  # declared size times delta
    right_of_100_for_2: float  # about somebody with two records, or about two persons where the unit is a person
    right_of_100_for_5: float
    right_of_100_with_all_others: float | None = None  # although all other sites of secure sums tell what they added


@spec
class Mechanism:
    """What one run did at one site, and the events from which its epsilon can be computed again."""

    run: str
    sampling_assumed: str
    sampling_run: str
    sampling_rate: float
    noise_multiplier: float  # that each step counts with
    max_grad_norm: float | None
    local_steps: int
    rounds: int
    metrics_noise_multiplier: float
    charges: tuple[Charge, ...]
    records_per_user: int = 1  # most records of one unit in a step; 1 where the unit is a record
    shared: SharedNoise | None = None  # how sites made a secure sum's noise together; None: the site made all of it


@spec
class CurvePoint:
    """Epsilon at a delta."""

    delta: float
    epsilon_pld: float | None
    epsilon_rdp: float | None


@spec
class Step:
    """Epsilon after a round, or after a run, in order; by `cohorts`: of each line of `Lifetime.cohorts`."""

    run: str
    round: int | None
    time: str | None
    epsilon: float | None
    cohorts: tuple[float | None, ...] | None = None


@spec
class SiteReport:
    """One site."""

    site: str
    source: Source  # where the figures come from
    verdict: Verdict
    declared_size: int | None
    approved: Approved | None
    spent: Spent | None
    meaning: Meaning | None
    mechanisms: tuple[Mechanism, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    steps: tuple[Step, ...] = ()
    lifetime: Lifetime | None = None
    verification: Verification | None = None
    releases: tuple[Release, ...] = ()
    asserted: Mapping[str, bool] = field(default_factory=dict)  # what the site states and no software can check
    reported: str | None = None  # day of the site's own report, where the figures over all runs come from one
    by_trust: Epsilons | None = None  # epsilon of all charges, by who looks; None: every site made its own noise


@spec
class Assumption:
    """Something that the guarantee rests on."""

    code: str
    status: Status  # derive/rules.py says what each means
    evidence: str  # names a version and a test, a file, or who states it


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
    rounds: tuple[RoundCost, ...]
    findings: tuple[str, ...] = ()  # what they say against the training
    energy: Energy | None = None  # of the machine that ran this; None: not asked for
    detail: Detail | None = None  # what stands behind the final ones, where the task has labels
    kept: Kept | None = None  # what the scores of the rounds decided, where the settings let them
    selection: Selection | None = None  # the search that the run is a trial of, and whether that picked it; None: none
    held_out: tuple[HeldOut, ...] | None = None  # noised scores of the sites over runs, whose end may `fall`
    held_out_epsilon: float | None = None  # what this run's cost
    fall: Fall | None = None


@spec
class Cell:
    """A field of an impact assessment or of technical documentation, and who fills it."""

    code: str
    state: CellState
    facts: Mapping[str, str]


@spec
class Signature:
    """An Ed25519 signature over everything else in the report."""

    key: str
    signature: str


@spec
class Report:
    """A run as its lead knows it, or a ledger as its site does; `released` and the other tuples of texts are codes."""

    facts: Annotated[Facts, Field(discriminator="kind")]  # that everything else follows from
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
    admits: Arrivals | None = None  # the only people whom a run charged; None: everybody
    signature: Signature | None = None
    schema_version: Annotated[int, Field(ge=REPORT_SCHEMA, le=REPORT_SCHEMA)]

    @property
    def banners(self) -> tuple[str, ...]:
        """Codes of what every page says first: that no real sites took part, or that noise came from a seed."""
        simulated = any(cell.facts.get("runtime") in ("simulation", "ray") for cell in self.cells)
        return (*(("simulation",) if simulated else ()), *(("seeded",) if self.seeded_noise else ()))


class Problem(NamedTuple):
    """A wrong figure of a report, and what was found in its place."""

    where: str
    said: object
    found: object


_ADAPTER = TypeAdapter(Report)
_NOT_DERIVED = ("schema_version", "facts", "signature")
UNSAID = {"admits", "arrivals", "cohorts", "lost_cohorts", "lost_rows", "held_out", "held_out_epsilon", "fall"}


def to_json(report: Report) -> dict[str, Any]:
    """Plain JSON: facts, what is derived from them, signature; `from_json` gives the report back."""
    derived = dict(_ADAPTER.dump_python(report, mode="json"))
    schema, facts, signature = (derived.pop(key) for key in _NOT_DERIVED)
    return {"schema_version": schema, "facts": _said(facts), "derived": _said(derived), "signature": signature}


def _said(value: Any) -> Any:
    """Without what few reports say: others keep their bytes, and so their signatures."""
    if isinstance(value, dict):
        return {key: _said(one) for key, one in value.items() if one is not None or key not in UNSAID}
    return [_said(one) for one in value] if isinstance(value, list) else value


def from_json(text: str | bytes) -> Report:
    """The report in a `report.json`, or a ConfigError if the text is none of this schema version."""
    fields = json.loads(text)
    bound = f"must be as in a report of schema version {REPORT_SCHEMA} (fedtune report schema)"
    if not isinstance(fields, dict):
        raise ConfigError("report", "another value", bound)
    if "schema_version" in fields:
        check_schema("schema_version", fields["schema_version"], REPORT_SCHEMA, of="report")
    expected = (*_NOT_DERIVED, "derived")
    for key in (*expected, *fields):
        if key not in fields or key not in expected or (key == "derived" and not isinstance(fields[key], dict)):
            said = "absent" if key not in fields else "unknown" if key not in expected else "another value"
            raise ConfigError(key, said, bound)
    derived = fields.pop("derived")
    if repeated := sorted(derived.keys() & set(_NOT_DERIVED)):
        raise ConfigError(f"derived.{repeated[0]}", "unknown", bound)
    try:
        return _ADAPTER.validate_json(json.dumps({**derived, **fields}), strict=True)  # "1" and true are no numbers
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [str(part) for part in first["loc"]]
        where = ".".join(place if place and place[0] in _NOT_DERIVED else ["derived", *place])
        said = {"missing": "absent", "unexpected_keyword_argument": "unknown"}.get(first["type"], "another value")
        raise ConfigError(where, said, bound) from None


class _Described(GenerateJsonSchema):
    """A field's description is the comment on its line."""

    def dataclass_schema(self, schema: DataclassSchema) -> JsonSchemaValue:
        made = super().dataclass_schema(schema)
        for name, text in re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(schema["cls"]), re.MULTILINE):
            made["properties"][name]["description"] = text
        return made


def schema_text() -> str:
    """The JSON schema of a report.json."""
    schema = _ADAPTER.json_schema(schema_generator=_Described)
    properties, required = schema["properties"], [key for key in schema["required"] if key not in _NOT_DERIVED]
    whole = {key: properties.pop(key) for key in _NOT_DERIVED}
    whole["derived"] = {"type": "object", "additionalProperties": False, "properties": properties, "required": required}
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fedtune report"}
    schema |= about | {"properties": whole, "required": sorted(whole)}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
