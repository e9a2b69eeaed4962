"""The content of `run.json`: the result of a run.

Its keys are the fields of the classes below and are a public interface. Non-finite values, which JSON cannot express,
are null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedtune.evaluation.bootstrap import get_score_direction
from fedtune.federation.early_stopping import SelectedRound
from fedtune.federation.lead import LeadState, RoundResult, Scores, SiteCharge, compute_site_charge
from fedtune.formatting import convert_infinite_to_none, convert_none_to_infinite
from fedtune.privacy.accountant import NEIGHBORING_RELATION
from fedtune.privacy.run_plan import Plan
from fedtune.runs.cost import Energy
from fedtune.spec import RUN_SCHEMA
from fedtune.tasks.measures import Detail
from fedtune.version import __version__

if TYPE_CHECKING:  # imports pydantic, which readers of results do not need
    from fedtune.config import RunConfig

DIVERGED = "diverged"
WORSE = "worse_than_before"
GUESS = "no_better_than_a_guess"
DATA_CHANGED = "data_changed"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalResult:
    """Test scores before and after training, total wall time, and peak memory of this process."""

    metrics: Scores
    metrics_before: Scores = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    constant: float | None = None  # primary metric of the best constant prediction on the test file; None without one
    findings: tuple[str, ...] = ()  # codes of detected problems (`find_problems`)
    # round of the selected adapter; None: the last round
    selected_round: SelectedRound | None = None
    energy: Energy | None = None  # energy and carbon, if measured
    # detailed scores after training; None without labels or with non-finite figures
    detail: Detail | None = None


_LOST = 2.0  # growth factor of the loss that indicates unsuitable noise or rates


def find_problems(
    rounds: Sequence[RoundResult], before: Scores, after: Scores, *, primary_metric: str, guess: float | None, rows: int
) -> tuple[str, ...]:
    """Detect training problems from a run's scores, and return their codes.

    Args:
        rounds: the finished rounds.
        before: scores on the test file before training; empty without a test file.
        after: scores on the test file after training; empty without a test file.
        primary_metric: name of the primary metric.
        guess: primary metric of the best constant prediction; None without one.
        rows: number of records in the test file.
    """
    loss, was = after.get("loss"), before.get("loss")
    lost = bool(loss and was and loss > _LOST * was) or any(
        convert_infinite_to_none(score) is None for score in after.values()
    )
    if lost or any(result.diverged for result in rounds):
        return (DIVERGED,)
    score, started = after.get(primary_metric), before.get(primary_metric)
    if score is None:
        return ()
    # One standard error of a proportion of `rows` records.
    error = 0.0 if primary_metric == "loss" else math.sqrt(max(0.0, score * (1 - score)) / rows)
    sign = get_score_direction(primary_metric)
    worse = started is not None and sign * score < sign * started - error
    guessed = guess is not None and sign * score <= sign * guess + error
    return tuple(code for code, holds in ((WORSE, worse), (GUESS, guessed)) if holds)


def drop_infinite_scores(scores: Mapping[str, float | None]) -> Mapping[str, float | None]:
    """Replace non-finite scores, such as the NaN loss of a diverged model, with None for JSON."""
    return {name: convert_infinite_to_none(score) for name, score in scores.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyResult:
    """The privacy guarantee of the run.  `epsilon` is the maximum over all charged sites.

    After early stopping, `epsilon` is the epsilon of the whole plan, because the stopping time depends on scores and a
    smaller value is not proven.
    """

    unit: str = "record"
    records_per_user: int = 1
    neighboring_relation: str = NEIGHBORING_RELATION.name.lower()
    delta: float
    epsilon: float | None = None
    seeded_noise: bool
    sites: Mapping[str, SiteCharge]


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """The frozen base model of a run."""

    path: str  # without local folders
    public_id: str | None = None  # id on the Hugging Face hub, if configured
    # quantized source file, so that the weights differ from those of `public_id`
    gguf_file: str | None = None
    sha256: str  # digest of the manifest
    license: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The prompt template, a text with roles in braces, and the chat template that renders it as messages."""

    prompt: str
    chat: str
    sha256: str  # digest of the model's chat template if `chat` is "model", else of `prompt`


@dataclass(frozen=True, kw_only=True, slots=True)
class RunProvenance:
    """The provenance of an adapter: data set, base model, start adapter and template."""

    dataset: str
    declared_sizes: Mapping[str, int]  # site -> number of units
    base_model: BaseModel
    # lineage of the start adapter: digest, run, data set and privacy loss of its training; None: a new
    # adapter
    start_adapter: Mapping[str, Any] | None = None
    template: Template | None = None  # None for tasks without a template
    test_rows: int | None = None  # number of test records; None without a test file


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The content of `run.json`.  The digest of the final adapter is None until the run is finished."""

    schema_version: int = RUN_SCHEMA
    fedtune_version: str
    config_sha256: str
    task: str
    rounds: tuple[RoundResult, ...]
    final: FinalResult
    privacy: PrivacyResult
    provenance: RunProvenance
    adapter_digest: str | None = None

    @classmethod
    def build(
        cls, config: RunConfig, plan: Plan, state: LeadState, *, final: FinalResult, provenance: RunProvenance
    ) -> RunResult:
        """Build a run's result from its state.  Each epsilon is computed from the plan and the charged rounds."""
        charges = {site: compute_site_charge(state, site, plan) for site in config.federation.active}
        before, after = drop_infinite_scores(final.metrics_before), drop_infinite_scores(final.metrics)
        detail = final.detail if final.detail is None or final.detail.is_finite else None
        return cls(
            fedtune_version=__version__,
            config_sha256=config.digest(),
            task=config.task,
            rounds=tuple(replace(result, metrics=drop_infinite_scores(result.metrics)) for result in state.rounds),
            final=replace(final, metrics=after, metrics_before=before, detail=detail),
            provenance=provenance,
            privacy=PrivacyResult(
                unit=plan.unit,
                records_per_user=plan.records_per_user,
                delta=plan.delta,
                epsilon=convert_infinite_to_none(
                    max(convert_none_to_infinite(charge.proven_epsilon) for charge in charges.values())
                ),
                seeded_noise=config.runtime.seeded_noise,
                sites=charges,
            ),
        )
