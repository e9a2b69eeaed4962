"""The privacy report: the source data and all values derived from it, as stored in `report.json` and shown on the
pages.

The report is independent of language: it contains codes, figures and names, and no sentences. Every epsilon is an upper
bound; None means unbounded. Times are UTC in ISO format and are taken from the run or the ledger, so that equal inputs
give equal reports.
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

from fedtune.federation.drift import ScoreDrop
from fedtune.federation.early_stopping import SelectedRound
from fedtune.privacy.distributed_noise import DistributedNoise, Epsilons
from fedtune.privacy.events import Charge
from fedtune.report.facts import BudgetVerdict, Facts, Lifetime, Release, Source, Value
from fedtune.show.budget_text import ArrivalRange
from fedtune.spec import REPORT_SCHEMA, ConfigError, check_schema, spec

CellState = Literal["auto", "design", "site", "missing"]
Cells = Mapping[str, Mapping[CellState, Mapping[str, Value]]]
"""Field of an impact assessment or of technical documentation -> state of the cell -> fact -> value."""
Status = Literal["violated", "assumed", "asserted", "ensured", "verified"]


@spec
class SpentBudget:
    """The guaranteed privacy loss of a site, and the loss of the charged rounds by each accountant."""

    # The proved figure, which the verdict uses. For a run with any charge it is the epsilon of the whole plan, since
    # early stopping and a site's participation may depend on releases. For a ledger it is the filter's epsilon.
    epsilon: float | None
    epsilon_pld: float | None  # epsilon of the charged rounds by PLD accounting
    epsilon_rdp: float | None  # epsilon of the charged rounds by RDP accounting
    planned_epsilon: float | None  # epsilon of the whole plan by PLD accounting; None for a ledger
    rounds: int
    steps: int


@spec
class Ceiling:
    """A bound on an attacker's success: the posterior probability, or the share of used records that an attack finds.

    A single outcome may exceed a posterior bound, with a small probability that can be many times delta.
    """

    operating_point: float  # the attacker's prior probability, or the false positive rate
    ceiling: float  # bound from (epsilon, delta) alone
    mechanism: float | None = None  # bound from the mechanism's trade-off curve; None: not computed


@spec
class Meaning:
    """The meaning of (epsilon, delta), expressed as success rates of attacks.

    The fields `correct_of_100_*` bound the correct membership guesses out of 100 if half of the records were used.
    """

    correct_of_100_ceiling: float  # bound from (epsilon, delta) alone
    correct_of_100_mechanism: float | None  # bound from the mechanism's trade-off curve
    posterior: tuple[Ceiling, ...]
    hit_rates: tuple[Ceiling, ...]
    expected_failures: float | None  # declared size times delta
    correct_of_100_for_2: float  # bound for a person with two records, or for two persons if the unit is a person
    correct_of_100_for_5: float  # bound for a person with five records, or for five persons if the unit is a person
    correct_of_100_with_all_others: float | None = None  # bound if all other sites of secure aggregation collude


@spec
class Mechanism:
    """The mechanism of one run at one site, with the events from which its epsilon can be recomputed."""

    run: str
    sampling_run: str
    sampling_rate: float
    noise_multiplier: float  # noise multiplier with which each step is accounted
    max_grad_norm: float | None  # None: no clipping, or unknown
    local_steps: int
    rounds: int
    metrics_noise_multiplier: float
    charges: tuple[Charge, ...]
    records_per_user: int = 1  # largest number of one person's records in a step; 1 if the unit is a record
    # noise shares under secure aggregation; None: the site added all of the noise
    shared: DistributedNoise | None = None


@spec
class CurvePoint:
    """Epsilon at one value of delta, by both accountants."""

    delta: float
    epsilon_pld: float | None
    epsilon_rdp: float | None


@spec
class EpsilonStep:
    """Cumulative epsilon after a round or a run; `cohorts` has one value for each entry of `Lifetime.cohorts`."""

    run: str
    round: int | None
    time: str | None
    epsilon: float | None
    cohorts: tuple[float | None, ...] | None = None


@spec
class SiteReport:
    """The values that are derived for one site: verdict, privacy loss, its meaning, mechanisms and releases."""

    site: str
    source: Source  # source of the figures
    verdict: BudgetVerdict
    spent: SpentBudget
    meaning: Meaning | None
    mechanisms: tuple[Mechanism, ...]
    curve: tuple[CurvePoint, ...]
    steps: tuple[EpsilonStep, ...]
    lifetime: Lifetime | None = None  # a ledger's lifetime figures; None in a run's report
    releases: tuple[Release, ...] = ()  # a run's releases as recorded by the lead; () if the site's statement has them
    by_trust: Epsilons | None = None  # epsilon of all charges by observer; None: every site added all of its noise


@spec
class Assumption:
    """An assumption on which the guarantee depends."""

    code: str
    status: Status  # the statuses are explained in derive/rules.py
    evidence: str  # a version and a test, a file, or the sites that assert it


@spec
class Utility:
    """The utility of a run: its privacy loss by round, the selected round, and drops in the sites' noised scores."""

    epsilons: tuple[float | None, ...]  # largest epsilon of any site after each finished round
    selected_round: SelectedRound | None  # the round that scores selected, if the settings enable this
    held_out_epsilon: float | None  # epsilon of this run's noised scores; None: the run has no held-out history
    score_drop: ScoreDrop | None  # score drop at the end of the held-out history


@spec
class Signature:
    """An Ed25519 signature over the rest of the report."""

    key: str
    signature: str


@spec
class Report:
    """The report of a run or of a ledger; its tuples of strings contain codes from the catalog."""

    schema_version: Annotated[int, Field(ge=REPORT_SCHEMA, le=REPORT_SCHEMA)]
    facts: Annotated[Facts, Field(discriminator="kind")]  # source data of all other fields
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
    utility: Utility | None = None  # only in a run's report
    admits: ArrivalRange | None = None  # arrival range of the people whom a run charged; None: all people
    signature: Signature | None = None

    @property
    def known(self) -> Mapping[str, Value]:
        """Fact -> value, for all facts in cells with a known value."""
        of_states = (facts for states in self.cells.values() for facts in states.values())
        return {name: value for facts in of_states for name, value in facts.items() if value is not None}

    @property
    def banners(self) -> tuple[str, ...]:
        """The codes of the warnings at the top of every page: "simulation" without real sites, "seeded" for seeded
        noise.
        """
        return (*(("simulation",) if self.facts.simulated else ()), *(("seeded",) if self.facts.seeded_noise else ()))


class Problem(NamedTuple):
    """A wrong value in a report, and the correct value."""

    where: str
    reported: object
    expected: object


_ADAPTER = TypeAdapter(Report)


def to_json(report: Report) -> dict[str, Any]:
    """Convert a report to JSON-compatible values; `from_json` parses them."""
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
        bound = f"does not match report schema version {REPORT_SCHEMA} (see fedtune report schema)"
        raise ConfigError(".".join(map(str, first["loc"])) or "report", said, bound) from None


class _Described(GenerateJsonSchema):
    """A JSON schema generator that takes each field's description from the comment on its line."""

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
