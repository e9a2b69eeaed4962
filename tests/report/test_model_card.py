"""The card of a finished run: what it says, that tools read it, that it is text alone; the sum of synthetic records."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from fedtune.privacy.accountant import format_epsilon, format_factor
from fedtune.report.facts import StartAdapter
from fedtune.report.from_run import RunRecord, read_run
from fedtune.report.model import Report
from fedtune.report.model_card import CardFormat, render_card_text
from fedtune.report.page.render import render_label
from fedtune.report.synthetic_card import compose_losses
from fedtune.report.verify_report import derive_report, problems
from fedtune.runs.lineage import PRIVATE_BASES, sum_start_losses

from ..conftest import simulate
from .shown import change_facts, read_status

STARTS = json.loads(Path(__file__).with_name("starts.json").read_text())
FORM = CardFormat(what="An adapter", library="peft", relation="adapter", loading="import peft", needs_base=True)


@pytest.fixture(scope="module")
def record(run_folder: Path) -> RunRecord:
    return read_run(run_folder)


def change_model(record: RunRecord, **changes: Any) -> RunRecord:
    return replace(record, config=replace(record.config, model=replace(record.config.model, **changes)))


def read_front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_model_card_loads_in_hub_tools_and_matches_the_report(run_folder: Any, run_report: Any) -> None:
    card = ModelCard.load(run_folder / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.datasets == ["banking77"]
    assert card.data.model_name == "run"
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == run_report.facts.final
    # It says what the report says and shows its label.
    text = card.text
    ref = f"was kept, epsilon {format_epsilon(run_report.epsilon)} at delta 0.00001, for one record"
    assert f"![Privacy label: The lead's limit for this run {ref}" in text
    assert "](label.svg)" in text
    label = (run_folder / "adapter" / "label.svg").read_text()
    assert label == render_label(run_report, language="en")
    assert hashlib.sha256((run_folder / "report.json").read_bytes()).hexdigest() in label
    assert f"by at most a factor of {format_factor(run_report.epsilon)}, plus" in text
    assert f"This is epsilon {format_epsilon(run_report.epsilon)} at delta " in text
    assert (
        f"**The lead's limit for this run was kept.** Privacy loss (epsilon): {format_epsilon(run_report.epsilon)} of "
        in text
    )
    assert text.count("\n- ") == len(run_report.not_protected)
    assert "On 10 test records. These scores are exact" in text
    assert "site-1 80, site-2 90" in text
    assert all(
        one in text for one in (run_report.facts.provenance.config_sha256, run_report.facts.provenance.model_sha256)
    )


@pytest.mark.parametrize(("kind", "words"), [("lora", "A LoRA"), ("dora", "A DoRA"), ("ia3", "An IA3")])
def test_model_card_names_the_kind_of_adapter(record: RunRecord, run_report: Report, kind: str, words: str) -> None:
    of_kind = replace(record, config=replace(record.config, lora=replace(record.config.lora, kind=kind)))
    text = render_card_text(of_kind, run_report, CardFormat.for_adapter(of_kind.config, folder="adapter"))
    assert kind in read_front_matter(text)["tags"]
    assert f"{words} adapter" in text


def test_model_card_without_a_guarantee_promises_nothing(tmp_path: Path) -> None:
    for override, reason in (
        ("privacy=none", "No noise was added, so nothing hides a single record."),
        ("runtime.seeded_noise=true", "The noise came from a seed."),
    ):
        folder = simulate(override, "federation.num_rounds=1", into=tmp_path, name=override[:7])
        text = (folder / "adapter" / "README.md").read_text()
        assert "**No guarantee.** " + reason in text
        assert "There is no promise." in text
        assert "at most a factor" not in text
        assert "differential-privacy" not in read_front_matter(text)["tags"]


def test_model_card_names_the_base_by_its_public_id(record: RunRecord, run_report: Report) -> None:
    changed = change_model(record, path="/home/ada/models/small", public_id="owner/small", license="Apache-2.0")
    card = render_card_text(changed, run_report, FORM)
    front = read_front_matter(card)
    of_base = {"base_model": "owner/small", "base_model_relation": "adapter", "license": "apache-2.0"}
    assert of_base.items() <= front.items()
    assert "An adapter of owner/small." in card
    assert "import peft" in card
    assert "/home/ada" not in card
    made_up = render_card_text(record, run_report, FORM)
    assert "import peft" not in made_up, "it cannot be loaded"
    assert "`fedtune export --merge` writes it out" in made_up


def test_model_card_warns_that_quantized_bases_differ_from_the_original(record: Any, run_report: Report) -> None:
    changed = change_model(record, public_id="owner/small", gguf_file="small.Q4_1.gguf")
    text = " ".join(render_card_text(changed, run_report, FORM).split())
    assert "expanded from small.Q4\\_1.gguf" in text
    assert "they are not those of owner/small bit for bit" in text
    for dtype in ("float32", "mixed", "nf4"):
        text = " ".join(render_card_text(change_model(record, dtype=dtype), run_report, FORM).split())
        assert ("tuned, and scored below, beside the base's layers in the number" in text) == (dtype != "float32")


def test_user_text_is_escaped_in_the_model_card(record: RunRecord, run_report: Report) -> None:
    hostile = 'none |\n\n# <b>Safe</b> `x` [click](http://x) "\n---\nlicense: mit'
    provenance = replace(run_report.facts.provenance, model_license=hostile)
    card = render_card_text(
        change_model(record, license=hostile), change_facts(run_report, provenance=provenance), FORM
    )
    front, body = read_front_matter(card), card.split("---\n", 2)[2]
    assert (front["license"], front["license_name"]) == ("other", " ".join(hostile.split()))
    assert "\n# <b>" not in body
    assert "<b>" not in body.replace("\\<b\\>", "")
    assert "\\[click\\]\\(http://x\\)" in body
    assert ModelCard(card).data.license_name == front["license_name"]


def test_model_card_reports_the_start_adapter_and_its_privacy_cost(record: RunRecord, run_report: Report) -> None:
    for spent, expected in (
        (
            {"delta": 1e-5, "epsilon": 2.5},
            ", of run intents on public; by the lead's word its training spent epsilon 2.500 at delta ",
        ),
        ({"delta": 1e-5, "epsilon": None}, ", of run intents on public; its training bounds nothing |"),
        ({"run": None, "delta": None, "epsilon": None}, "; what its training spent is not known |"),
        ({"epsilon": None, "delta": 1e-5, "public": True}, ", of run intents on public; it was trained without p"),
    ):
        start = StartAdapter(**{"digest": "ab" * 32, "run": "intents", "dataset": "public", "unit": "record"} | spent)
        started = change_facts(run_report, provenance=replace(run_report.facts.provenance, start_adapter=start))
        assert f"SHA-256 {'ab' * 32}{expected}" in render_card_text(record, started, FORM)
        report = derive_report(started.facts)
        assert (report.verdict.state, report.verdict.reasons) == ("within", ("began_in_an_adapter",))
        code = "start_adapter_public" if start.public else "start_adapter_covered_elsewhere"
        assert (read_status(report, code), problems(report)) == ("assumed", [])


def test_prior_spending_of_a_start_adapter_adds_up() -> None:
    for before, spent in STARTS["one start adapter: its own start, and the total epsilon and delta"]:
        assert sum_start_losses({"epsilon": 2.0, "delta": 0.25, "unit": "record", "start_adapter": before}) == tuple(
            spent
        )


def test_prior_spending_of_synthetic_data_runs_adds_up() -> None:
    for start, epsilon in STARTS["two runs: the start of the first run, and the total epsilon"]:
        runs = [{"epsilon": 0.1, "delta": 1e-5, "unit": "record", "start": start}]
        runs.append({"epsilon": 0.2, "delta": 2e-5, "unit": "record", "start": None})
        assert compose_losses(runs)[0] == epsilon, "as a person adds it up"
        assert start or compose_losses(runs)[1] == 3e-5
    base = {**PRIVATE_BASES["vaultgemma"], "public": False}
    assert compose_losses([{"epsilon": 0.1, "delta": 1e-5, "unit": "record", "start": base}]) == (0.1, 1e-5)
