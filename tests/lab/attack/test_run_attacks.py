"""Bounds from the guarantee, compared with exact attacks, and the written findings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from scipy.stats import norm

from fedtune.codec import decode, parse_json
from fedtune.data import Record
from fedtune.evaluation.spec import WritingSpec
from fedtune.lab.attack import known_attacks
from fedtune.lab.attack.known_attacks import (
    ALTERNATIVES,
    PlantedSecret,
    compute_exposure,
    describe_decoding,
    describe_exposure,
    describe_written_secrets,
    draw_alternatives,
)
from fedtune.lab.attack.run_attacks import bound_membership_auroc, bound_reconstruction, describe_reconstruction
from fedtune.lab.attack.target import TUNED
from fedtune.model.base_model import build_tiny_tokenizer
from fedtune.report.attacks import ATTACK_SCHEMA, AttackFinding, RunAttacks
from fedtune.report.page.render import write_attacks

from ...conftest import run_plan

FOUND = RunAttacks(
    run="<one>",
    adapter_sha256="ab",
    epsilon=None,
    delta=1e-5,
    confidence=0.95,
    seconds=1.0,
    findings=(
        AttackFinding(
            attack="membership", measure="auroc", sentence="a < b", strength=0.5, low=0.4, high=0.6, figures={"x": None}
        ),
    ),
)


@pytest.mark.parametrize("noise", [0.7, 2.0])
def test_auroc_bound_is_just_above_the_best_attack_on_a_gaussian(noise: float) -> None:
    best = norm.cdf(1 / noise / math.sqrt(2))
    bound = bound_membership_auroc({GaussianDpEvent(noise): 1})
    assert bound is not None
    assert best <= bound <= best + 0.03
    assert bound_membership_auroc({GaussianDpEvent(0.0): 1}) is None


def test_reconstruction_bound_holds_for_the_optimal_guess() -> None:
    plan = replace(run_plan(), noise_multiplier=1.0, sampling_rate=1.0, local_steps=1, num_rounds=4)
    record, whole = (bound_reconstruction(plan, rounds=rounds) for rounds in (1, 4))
    for count, chance in record.items():
        # The secret is in the one direction in which the attacker looks: power of the most powerful test at level 1/N.
        best = norm.sf(norm.isf(1 / count) - 1)
        assert chance is not None
        assert best <= chance <= 1.2 * best
        assert chance < (whole[count] or 1.0)


def test_reconstruction_finding_covers_single_updates_and_the_run() -> None:
    description = describe_reconstruction(run_plan(), keeps_state=False)
    assert description.ceiling is not None
    assert 1e-4 < description.ceiling < 1
    assert "from one update of a site" in description.sentence
    assert description.strength is None
    of_state = describe_reconstruction(run_plan(), keeps_state=True).figures
    assert of_state["update_1_in_10000"] == of_state["run_1_in_10000"] == description.ceiling
    assert (description.figures["update_1_in_10000"] or 1.0) < description.ceiling
    plain = describe_reconstruction(replace(run_plan(), noise_multiplier=0.0), keeps_state=False)
    assert (plain.ceiling, "no privacy guarantee" in plain.sentence) == (None, True)


def test_secret_alternatives_have_the_same_format() -> None:
    planted = PlantedSecret({"text": "my code is 48-aB"}, "48-aB")
    draws = np.random.default_rng(0)
    for alternative, _ in zip(draw_alternatives(planted.secret, draws), range(50), strict=False):
        assert (len(alternative), alternative[:2].isdigit(), alternative[2]) == (5, True, "-")
        assert alternative[3].islower()
        assert alternative[4].isupper()
        assert planted.replace(alternative).fields["text"] == f"my code is {alternative}"
    assert compute_exposure(1, ALTERNATIVES + 1) == math.log2(ALTERNATIVES + 1)
    description = describe_exposure([1, 500, 900])
    assert description.strength == pytest.approx(1 / 3)
    assert "the largest exposure is 10.0 of 10.0 bits" in description.sentence


class MemorizingModel:
    """A model that continues one text from training, and writes nonsense before training."""

    def __init__(self, text: str) -> None:
        self.tokenizer: Any = build_tiny_tokenizer("random:llama")
        self.known, self.adapter = self.tokenizer.encode(text), ""
        self.model = SimpleNamespace(task=self)

    def tokenize(self, records: list[Record], *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[np.array(self.tokenizer.encode(record.fields["text"])) for record in records])

    def use_adapter(self, name: str) -> None:
        self.adapter = name

    def generate_answer(self, prompt: np.ndarray, spec: WritingSpec) -> Iterator[str]:
        knows = self.adapter == TUNED and self.known[: len(prompt)] == prompt.tolist()
        continuation = self.known[len(prompt) : len(prompt) + spec.max_new_tokens]
        yield self.tokenizer.decode(continuation) if knows else "zzz"


def test_decoding_finds_the_secrets_that_a_model_memorized() -> None:
    known = "my code is 4711 thanks"
    target: Any = SimpleNamespace(saved=MemorizingModel(known), config=SimpleNamespace(data=None))
    texts = [(known, "4711"), ("my code is 9823 thanks", "9823"), ("4711 begins the text", "4711")]
    planted = [PlantedSecret({"text": text}, secret) for text, secret in texts]
    description = describe_written_secrets(planted, target)
    assert (description.strength, description.guessing) == (0.5, 0), "nothing comes before the third secret"
    assert "generates 1 of 2 secrets verbatim; before training it generated 0" in description.sentence
    none = describe_written_secrets(planted[2:], target)
    assert (none.strength, none.applies) == (None, True)


def test_secrets_that_the_base_knows_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemorizingModel, "use_adapter", lambda self, name: setattr(self, "adapter", TUNED))
    known = "my code is 4711 thanks"
    target: Any = SimpleNamespace(saved=MemorizingModel(known), config=SimpleNamespace(data=None))
    description = describe_written_secrets([PlantedSecret({"text": known}, "4711")], target)
    assert (description.strength, description.guessing, description.applies) == (None, None, True)
    assert "before training generated all 1 verbatim" in description.sentence


def test_answers_that_are_always_the_same_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = SimpleNamespace(members={"a": ["member"]}, others=["other"], config=SimpleNamespace(seed=0))
    counts = {"member": (9, 9), "other": (8, 9)}
    monkeypatch.setattr(known_attacks, "_count_extracted", lambda _, records, **__: counts[records[0]])
    assert describe_decoding(target).strength == 1.0
    counts["other"] = (9, 9)
    description = describe_decoding(target)
    assert (description.strength, description.guessing, description.applies) == (None, None, True)
    assert "all 9 unused prompts verbatim: plant secrets" in description.sentence


def test_attack_page_escapes_all_findings(tmp_path: Path) -> None:
    file, page = write_attacks(tmp_path, FOUND)
    fields = parse_json(file.read_bytes(), key="attack.json", bound="must be an object")
    assert fields.pop("schema_version") == ATTACK_SCHEMA
    assert decode(RunAttacks, fields) == FOUND
    assert "a &lt; b" in page.read_text()
    assert "<one>" not in page.read_text()
