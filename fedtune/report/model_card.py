"""Model cards: a README.md with YAML front matter for the Hugging Face Hub.

All figures and the wording of the guarantee come from the run's report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup, escape

from fedtune.config import RunConfig
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import format_score_name
from fedtune.model.adapter_files import CARD, LABEL
from fedtune.model.source import find_public_location
from fedtune.model.spec import ADAPTERS, NO_ADAPTER, NO_BASE
from fedtune.report.facts import RunFacts
from fedtune.report.from_run import RunRecord, build_run_report, read_run
from fedtune.report.gate_verdict import GATE, read_verdict
from fedtune.report.loading_code import build_loading_code
from fedtune.report.model import Report
from fedtune.report.page.render import create_template_environment, render_label, write_all, write_files
from fedtune.report.page.translations import load_catalog
from fedtune.report.page.view import Words
from fedtune.report.signing import compute_report_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFormat:
    """The format of a saved model: its name on the card, the Hub's metadata, and the code that loads it."""

    what: str  # description of the format
    library: str  # the Hub's `library_name`
    relation: str  # the Hub's `base_model_relation`
    loading: str  # Python code that loads the model, and its base model if `needs_base`
    needs_base: bool = False
    has_label: bool = True  # whether the run's privacy label applies to this model
    is_judged: bool = True  # whether the run's `fedtune gate` verdict applies to this model

    @classmethod
    def for_adapter(cls, config: RunConfig, *, folder: str) -> CardFormat:
        """Describe an adapter that is loaded on top of its base model; `folder` is its path in the loading code."""
        base, needs_base = find_public_location(config.model), config.lora.kind != NO_ADAPTER
        loading = build_loading_code(config.bound_task, config.data, base=base, folder=folder)
        what, library = ADAPTERS[config.lora.kind], "peft" if needs_base else "safetensors"
        return cls(what=what, library=library, relation="adapter", loading=loading, needs_base=needs_base)


def write_report_and_card(run: Path, *, language: str) -> None:
    """Write a run's report into its folder, and the model card with the privacy label into its adapter's folder.

    Raises:
        ConfigError: the folder is not a run folder, or its files belong to different runs.
        RunError: a file is damaged.
    """
    report = build_run_report(run)
    write_files(run, report, language=language)
    write_all(run, render_adapter_card(run, report))  # repeats a verdict only with the signature of the new report.json


def render_adapter_card(run: Path, report: Report) -> Mapping[str, bytes]:
    """Return the model card and the privacy label of a run's adapter (file name -> content)."""
    record, adapter = read_run(run), RunFolder(run).adapter.name
    files = render_card_files(record, report, CardFormat.for_adapter(record.config, folder=adapter))
    return {f"{adapter}/{name}": data for name, data in files.items()}


def render_card_files(record: RunRecord, report: Report, form: CardFormat) -> Mapping[str, bytes]:
    """Return the model card of a finished run's model and its privacy label (file name -> content)."""
    return {CARD: render_card_text(record, report, form).encode(), LABEL: render_label(report, language="en").encode()}


def render_card_text(record: RunRecord, report: Report, form: CardFormat) -> str:
    """Return the model card of a finished run's model as Markdown; equal runs give equal cards."""
    model, made = record.config.model, record.result and record.result.provenance
    example = '[("a text", "another")]' if "text_pair" in record.config.data.columns else '["a text"]'
    words, template = Words(report, load_catalog("en")), made and made.template
    assert isinstance(report.facts, RunFacts), "a card is of a run's model"
    body = render_card(
        "model_card.md.j2",
        words=words,
        report=report,
        config=record.config,
        simulated=not record.deployed,
        form=form,
        gate=read_verdict(record.folder, report) if form.is_judged else None,
        has_gate=form.is_judged and (record.folder / GATE).is_file(),
        digest=compute_report_digest(report),
        base="its own, without a base model" if model.path == NO_BASE else model.public_id or model.public_path,
        label=LABEL,
        template=template,
        prompt=json.dumps(template.prompt, ensure_ascii=False) if template else None,
        rows=made.test_rows if made else None,
        scores=_map_scores_before_and_after(report),
        loading=None if form.needs_base and model.is_built_in else escape(form.loading.replace('["a text"]', example)),
    )
    return f"---\n{_build_front_matter(record, words, form).to_yaml()}\n---\n\n{body}"


def _build_front_matter(record: RunRecord, words: Words, form: CardFormat) -> ModelCardData:
    config = record.config
    task, model, dataset = config.bound_task, config.model, config.data.dataset
    scores = {
        name: after for name, (_, after) in _map_scores_before_and_after(words.report).items() if after is not None
    }
    of_test = partial(EvalResult, dataset_type=dataset, dataset_name=dataset, dataset_split="test")
    of_task = partial(of_test, task_type=task.hub_name or config.task)
    results = [of_task(metric_type=name, metric_value=score) for name, score in scores.items()]
    of_base = {"base_model": model.public_id, "base_model_relation": form.relation}
    known: dict[str, Any] = of_base if model.public_id is not None else {}
    if task.hub_name and model.path != NO_BASE:
        known["pipeline_tag"] = task.hub_name
    # The hub knows short names in lower case; any other license is "other", with its name.
    if model.license is not None and re.fullmatch(r"[A-Za-z0-9.-]+", model.license):
        known["license"] = model.license.lower()
    elif model.license is not None:
        known |= {"license": "other", "license_name": " ".join(_to_one_line(model.license).split())}
    tags = ["fedtune", "federated-learning", config.lora.kind, *(["differential-privacy"] if words.promises else [])]
    return ModelCardData(
        library_name=form.library,
        tags=[tag for tag in tags if tag != NO_ADAPTER],
        datasets=[dataset],
        metrics=sorted(scores),
        model_name=config.name,
        eval_results=results or None,
        **known,
    )


def _map_scores_before_and_after(report: Report) -> Mapping[str, tuple[float | None, float | None]]:
    """Return metric name -> its scores before and after training."""
    facts = report.facts
    assert isinstance(facts, RunFacts), "a card is of a run's model"
    return {name: (facts.before.get(name), after) for name, after in facts.final.items()}


def format_privacy_loss(epsilon: float | None, delta: float | None) -> str:
    """Format a privacy loss as "epsilon ... at delta ..."."""
    return "epsilon {} at delta {}".format(*map(load_catalog("en").figure, (epsilon, delta), ("epsilon", "exact")))


def _format_score(value: float | None) -> str:
    """Format a score with four decimals, such as 0.7500, without a negative zero."""
    return "not a number" if value is None or not math.isfinite(value) else f"{value:z.4f}"


def render_card(file: str, **values: object) -> str:
    """Render a card from its template, escaping all values for Markdown."""
    # For Markdown, where autoescape would escape for HTML.
    markdown: dict[str, Any] = {"finalize": _escape_markdown, "autoescape": False, "keep_trailing_newline": True}
    templates = create_template_environment().overlay(**markdown, lstrip_blocks=False)
    named = {
        "format_score_name": format_score_name,
        "score_text": _format_score,
        "figure": load_catalog("en").figure,
        "privacy_loss": format_privacy_loss,
        "in_code": _quote_code,
    }
    return templates.get_template(file).render(**named, **values)


def _escape_markdown(value: object) -> str:
    """Escape a value for a line of Markdown and remove its line breaks; Markup is trusted and not escaped."""
    if isinstance(value, Markup):
        return value.unescape()
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&])", r"\\\1", _to_one_line(str(value)))


def _quote_code(text: str) -> Markup:
    """Prepare a text for a code span in a table, where a backslash escapes nothing but a bar."""
    return Markup.escape(_to_one_line(text).replace("`", "'").replace("|", "\\|"))


def _to_one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
