"""A privacy report as data: the facts and everything that follows from them, which `report.json` and the pages show.

The report is the same in every language: it contains codes, figures and names, and no sentences.  Every epsilon is an
upper bound; None means unbounded.  Times are UTC in ISO format, and come from the run or the ledger, so that equal
inputs give equal reports.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import DataclassSchema

from fedtune.federation.drift import Fall
from fedtune.federation.early_stopping import Kept
from fedtune.privacy.distributed_noise import Epsilons, SharedNoise
from fedtune.privacy.events import Charge
from fedtune.report.facts import BudgetVerdict, Facts, Lifetime, Release, Source, Value
from fedtune.show.budget_text import ArrivalRange
from fedtune.spec import REPORT_SCHEMA, ConfigError, check_schema, spec

CellState = Literal["auto", "design", "site", "missing"]
Cells = Mapping[str, Mapping[CellState, Mapping[str, Value]]]
"""Field of an impact assessment or of technical documentation -> who fills in what -> fact -> value."""
Status = Literal["violated", "assumed", "asserted", "ensured", "verified"]


@spec
class Spent:
    """The guaranteed privacy loss, and what was charged."""

    # The figure that is proved, and that the verdict uses: of a run its whole plan's, unless nothing was charged, since
    # its end and a site's part in each round may depend on what it released; of a ledger that of the filter.
    epsilon: float | None
    epsilon_pld: float | None  # of what was charged, by PLD
    epsilon_rdp: float | None  # by RDP
    planned_epsilon: float | None  # of the whole plan by PLD; None for a ledger
    rounds: int
    steps: int


@spec
class Ceiling:
    """The most that an attacker can achieve: how sure to become, or which share of the used records to find.

    A single outcome may make an attacker surer, with a small probability that can be many times delta.
    """

    given: float  # how sure the attacker was before, or the share of false alarms
    ceiling: float  # from (epsilon, delta) alone
    mechanism: float | None = None  # by the mechanism's own curve; None: not computed


@spec
class Meaning:
    """The meaning of (epsilon, delta), expressed as frequencies.

    The fields `right_of_100_*` bound how many of 100 guesses about membership are right if half of the records were
    used.
    """

    right_of_100_ceiling: float  # from (epsilon, delta) alone
    right_of_100_mechanism: float | None  # by the mechanism's own curve
    posterior: tuple[Ceiling, ...]
    hit_rates: tuple[Ceiling, ...]
    expected_failures: float | None  # declared size times delta
    right_of_100_for_2: float  # about somebody with two records, or about two persons where the unit is a person
    right_of_100_for_5: float
    right_of_100_with_all_others: float | None = (
        None  # although all other sites of secure aggregation tell what they added
    )


@spec
class Mechanism:
    """The mechanism of one run at one site, and the events from which its epsilon can be recomputed."""

    run: str
    sampling_run: str
    sampling_rate: float
    noise_multiplier: float  # that each step counts with
    max_grad_norm: float | None  # None: nothing was clipped, or it is not known
    local_steps: int
    rounds: int
    metrics_noise_multiplier: float
    charges: tuple[Charge, ...]
    records_per_user: int = 1  # most records of one unit in a step; 1 where the unit is a record
    shared: SharedNoise | None = (
        None  # how sites made secure aggregation's noise together; None: the site made all of it
    )


@spec
class CurvePoint:
    """Epsilon at one value of delta."""

    delta: float
    epsilon_pld: float | None
    epsilon_rdp: float | None


@spec
class EpsilonStep:
    """Epsilon after a round or a run, in order; `cohorts` has one value for each entry of `Lifetime.cohorts`."""

    run: str
    round: int | None
    time: str | None
    epsilon: float | None
    cohorts: tuple[float | None, ...] | None = None


@spec
class SiteReport:
    """The part of a report that is derived from one site's facts."""

    site: str
    source: Source  # where the figures come from
    verdict: BudgetVerdict
    spent: Spent
    meaning: Meaning | None
    mechanisms: tuple[Mechanism, ...]
    curve: tuple[CurvePoint, ...]
    steps: tuple[EpsilonStep, ...]
    lifetime: Lifetime | None = None  # of a ledger; None: a run's report has what the site's own report says, if any
    releases: tuple[Release, ...] = ()  # of a run, as its lead saw them, where no report of the site lists them
    by_trust: Epsilons | None = None  # epsilon of all charges, by who looks; None: every site made its own noise


@spec
class Assumption:
    """An assumption on which the guarantee depends."""

    code: str
    status: Status  # derive/rules.py says what each means
    evidence: str  # names a version and a test, a file, or who states it


@spec
class Utility:
    """Results of a run's exact scores, which no guarantee covers, and of its sites' noised scores."""

    epsilons: tuple[float | None, ...]  # the largest of any site after each finished round
    kept: Kept | None  # what the scores of the rounds decided, where the settings let them
    held_out_epsilon: float | None  # cost of this run's noised scores, where the facts have a line of them
    fall: Fall | None  # at the end of that line


@spec
class Signature:
    """An Ed25519 signature over the rest of the report."""

    key: str
    signature: str


@spec
class Report:
    """A report of a run, as its lead knows it, or of a ledger, as its site does; the tuples of strings contain
    codes.
    """

    schema_version: Annotated[int, Field(ge=REPORT_SCHEMA, le=REPORT_SCHEMA)]
    facts: Annotated[Facts, Field(discriminator="kind")]  # that everything else follows from
    verdict: BudgetVerdict
    neighboring_relation: str
    epsilon: float | None
    randomness: str
    released: tuple[str, ...]
    sites: tuple[SiteReport, ...]
    covers: tuple[str, ...]
    leaves_out: tuple[str, ...]
    not_protected: tuple[str, ...]
    unprotected_figures: tuple[str, ...]
    assumptions: tuple[Assumption, ...]
    cells: Cells
    utility: Utility | None = None  # of a run
    admits: ArrivalRange | None = None  # the only people whom a run charged; None: everybody
    signature: Signature | None = None

    @property
    def known(self) -> Mapping[str, Value]:
        """All facts that the cells show."""
        of_states = (facts for states in self.cells.values() for facts in states.values())
        return {name: value for facts in of_states for name, value in facts.items() if value is not None}

    @property
    def banners(self) -> tuple[str, ...]:
        """Codes of the warnings at the top of every page: no real sites took part, or the noise was seeded."""
        return (*(("simulation",) if self.facts.simulated else ()), *(("seeded",) if self.facts.seeded_noise else ()))


class Problem(NamedTuple):
    """A wrong figure in a report, and the value that was found instead."""

    where: str
    said: object
    found: object


_ADAPTER = TypeAdapter(Report)


def to_json(report: Report) -> dict[str, Any]:
    """Convert a report to plain JSON values; `from_json` is the inverse."""
    return dict(_ADAPTER.dump_python(report, mode="json"))


def from_json(text: str | bytes) -> Report:
    """Parse the text of a `report.json`.

    Raises:
        ConfigError: the text is not a report of this schema version.
    """
    fields = json.loads(text)
    if isinstance(fields, dict) and "schema_version" in fields:
        check_schema("schema_version", fields["schema_version"], REPORT_SCHEMA, of="report")
    try:
        return _ADAPTER.validate_json(text, strict=True)  # "1" and true are no numbers
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = {"missing": "absent", "unexpected_keyword_argument": "unknown"}.get(first["type"], "another value")
        bound = f"must be as in a report of schema version {REPORT_SCHEMA} (fedtune report schema)"
        raise ConfigError(".".join(map(str, first["loc"])) or "report", said, bound) from None


class _Described(GenerateJsonSchema):
    """A JSON schema generator that uses the comment on a field's line as its description."""

    def dataclass_schema(self, schema: DataclassSchema) -> JsonSchemaValue:
        made = super().dataclass_schema(schema)
        for name, text in re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(schema["cls"]), re.MULTILINE):
            made["properties"][name]["description"] = text
        return made


def render_schema() -> str:
    """Return the JSON schema of report.json."""
    schema = _ADAPTER.json_schema(schema_generator=_Described)
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fedtune report"}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
