"""Votes: a record's gradient is one vote for the nearest candidate, and a run's weights are the vote shares."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from fedtune.api.compose import compose_run
from fedtune.config import read_saved_config
from fedtune.privacy import events
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.verify import verify
from fedtune.training.per_example import record_gradients

from ..builders import build_copy
from ..conftest import simulate
from ..model.conftest import make_batch, make_spec

CODES = {"card": 6, "fee": 3, "rate": 1}


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("votes") / "records.jsonl"
    codes = [code for code, tenths in CODES.items() for _ in range(40 * tenths)]
    path.write_text("".join(json.dumps({"code": code, "number": str(n)}) + "\n" for n, code in enumerate(codes)))
    return path


def verify_sites(folder: Path) -> list[History]:
    return [verify(path).history for path in sorted(folder.glob("sites/*/ledger.db"))]


def list_overrides(shares: Path) -> tuple[str, ...]:
    return (
        *("experiment=votes", "model=random_bert", "data.columns={text: code}", f"data.train_file='{shares}'"),
        *(f"data.labels=[{', '.join(CODES)}]", "data.train_fraction=1.0", "data.test_rows=null", "data.max_length=8"),
        *("data.validation_rows=null", "federation.num_sites=2", "data.declared_sizes=200"),
        *("privacy.noise_multiplier=1.0", "privacy.epsilon=8"),
    )


def test_vote_gradient_selects_the_nearest_candidate() -> None:
    model, batch = build_copy(make_spec(task="votes")), make_batch("votes")
    batch.targets[1] = -100  # a record that could not be encoded
    assert list(model.trainable()) == ["head.weight"], "training the base would change which candidate is nearest"
    with torch.no_grad():
        rows = model.task.embed(model, batch.input_ids, batch.attention_mask)
    expected = (rows @ model.get_buffer("candidates").T).argmax(dim=1)
    with record_gradients(model) as gradients:
        gradient = gradients.compute_gradients(batch)["head.weight"][:, 0]
    votes = -torch.nn.functional.one_hot(expected, 3).float()
    votes[1] = 0
    assert torch.equal(gradient, votes)


@pytest.mark.parametrize("aggregation", ["plain", "secure"])
def test_histogram_counts_votes_from_its_column(shares: Path, tmp_path: Path, aggregation: str) -> None:
    folder = simulate(*list_overrides(shares), f"federation.aggregation={aggregation}", into=tmp_path)
    weights = load_file(folder / "adapter" / "head.safetensors")["weight"][0]
    # Noise of 1 at each of two sites, over 400 votes.
    assert weights / weights.sum() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "changes",
    [
        ("federation.num_rounds=3",),
        ("federation.num_rounds=2", "training.local_steps=2"),
        ("federation.num_rounds=3", "federation.aggregation=secure"),
        ("data.declared_sizes=60", "federation.aggregation=secure"),  # 200 records
    ],
    ids=str,
)
def test_repeated_votes_release_shares_and_are_charged_per_round(
    shares: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    """An earlier version clamped weights to the limit on adapter values: 0.50, 0.38 and 0.12 after three rounds."""
    folder = simulate(*list_overrides(shares), "privacy.epsilon=20", *changes, into=tmp_path)
    weights = load_file(folder / "adapter" / "head.safetensors")["weight"][0]
    assert weights / weights.sum() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    plan = read_saved_config(folder).plan()
    for site in verify_sites(folder):
        assert site.count_total_charges() == events.count_mechanisms([plan.full_event])


def test_vote_sum_bound_covers_all_records_of_a_site(shares: Path) -> None:
    settings = [*list_overrides(shares), "data.declared_sizes=70000", "federation.aggregation=secure"]
    plan = compose_run(settings).plan()
    assert plan.secure_noise.bound == plan.with_noise(9.0).secure_noise.bound >= 70_000
    assert compose_run(["federation.aggregation=secure"]).plan().secure_noise.bound < 70_000
