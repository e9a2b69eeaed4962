"""Other kinds of records and votes at real sites over TLS: a simulation's weights bit for bit, broken records as 0."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.api.compose import compose_run
from fedtune.data import Record
from fedtune.ops.kits.models import model_place
from fedtune.sites.run_records import deal_out
from fedtune.sites.shared_settings import for_sites
from fedtune.sites.virtual_site import generated_policy

from ..pictures import COLOURS, encoded, picture, vision_folder, write_pictures
from .books import check_same_adapter, check_whole
from .federation import NAMES, Federation

pytestmark = pytest.mark.nightly

ROUNDS = 2
SHARED = (
    *("runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true", "data.declared_sizes=40"),
    *("privacy.noise_multiplier=4.0", f"federation.num_rounds={ROUNDS}", "training.local_steps=2"),
    "training.go_on_without_signal=true",
)
KINDS: dict[str, tuple[str, ...]] = {
    "features": (
        *("experiment=own_features", "data.dataset=labs", "data.labels=[sick,well]", "head.hidden=[4]"),
        "data.features=[{columns: [age], range: [0, 110]}, {columns: [states], range: [-1, 1], size: 2},"
        " {columns: [ward], categories: [a, b], missing: indicator}]",
    ),
    "token_classification": (
        *("experiment=own_entities", "data.dataset=notes", "data.labels=[drug]", "data.max_length=8"),
        *("data.windows=2", "data.stride=2", "model=random_bert", "lora=all_linear", "lora.rank=4"),
    ),
    "votes": (
        *("experiment=votes", "data.dataset=calls", "data.labels=[a fee, a lost card]", "model=random_bert"),
        "privacy.epsilon=8",
    ),
    "image": ("experiment=own_images", "data.dataset=scans", f"data.labels=[{','.join(COLOURS)}]", "data.max_length=5"),
}
BROKEN: dict[str, list[dict[str, Any]]] = {
    "features": [
        {"age": "old", "states": [0.5, 0.5], "ward": "a", "label": "sick"},
        {"age": 50, "states": [0.5], "ward": "a", "label": "sick"},
    ],
    "token_classification": [
        {"tokens": ["take", "aspirin"], "tags": ["O"]},
        {"tokens": ["take", "aspirin"], "tags": ["O", "B-secret"]},
    ],
    "votes": [{"text": " "}, {"note": "no text"}],
    "image": [{"image": "images/none.png", "label": "red"}, {"image": "images/cut.png", "label": "red"}],
}


def made_up(kind: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of a file in a folder, with the images that they name."""
    if kind == "image":
        with write_pictures(folder, f"{count}.csv", count, seed=count).open(newline="") as table:
            return list(csv.DictReader(table))
    draws = np.random.default_rng(count)
    if kind == "votes":
        return [{"text": str(draws.choice(["what is this fee", "my card is lost"])) + f" {n}"} for n in range(count)]
    if kind == "token_classification":
        notes = [[str(word) for word in draws.choice(["take", "aspirin", "daily", "stop"], 9)] for _ in range(count)]
        return [{"tokens": one, "tags": ["B-drug" if word == "aspirin" else "O" for word in one]} for one in notes]
    return [
        {
            "age": age,
            "states": draws.uniform(-1, 1, 2).tolist(),
            "ward": (None, "a", "b", "c")[int(draws.integers(4))],
            "label": "sick" if age > 50 else "well",
        }
        for age in draws.uniform(20, 90, count).tolist()
    ]


def written(record: Record, kind: str) -> dict[str, Any]:
    """A record as a line of a site's own file, whose names for its columns are its own."""
    if kind == "token_classification":
        return {f"own {role}": text.split("\n") for role, text in record.fields.items()}
    plain = {role.removeprefix("feature:"): text for role, text in record.fields.items()}
    return {f"own {name}": json.loads(text) if name in ("age", "states") else text for name, text in plain.items()}


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def federation(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation(held=False)


@pytest.mark.parametrize("kind", KINDS)
def test_real_sites_learn_it_as_simulated_ones_do(
    federation: Federation, command: Any, tmp_path: Path, kind: str
) -> None:
    files = {
        name: write(tmp_path / f"{name}.jsonl", made_up(kind, count, tmp_path))
        for name, count in (("in", 120), ("out", 20))
    }
    model = [f"model.path='{vision_folder(tmp_path / 'model')}'"] if kind == "image" else []
    given = [*KINDS[kind], *model, *SHARED, f"data.train_file='{files['in']}'", f"data.test_file='{files['out']}'"]
    names = ("federation.num_sites=3", f"federation.site_names=[{','.join(NAMES)}]")
    simulated = [*given, *names, f"name={kind}", f"tracking.output_dir='{tmp_path}'"]
    assert command("simulate", *simulated).code == 0
    config = compose_run(simulated)
    for site, records in zip(federation.sites.values(), deal_out(config).sites, strict=True):
        rows = [written(one, kind) for one in records.training]
        broken = [{f"own {name}": value for name, value in one.items()} for one in BROKEN[kind]]
        write(site.folder / "own.jsonl", [*rows, *broken])
        sent = for_sites(config)
        if kind == "image":
            shutil.copytree(tmp_path / "images", site.folder / "images")
            (site.folder / "images" / "cut.png").write_bytes(encoded(picture())[:-60])
            shutil.copytree(tmp_path / "model", model_place(site.kit, str(sent.model.sha256)))
        own = generated_policy(sent, config.plan(), site.name, lead=federation.lead_key)
        columns = {role: f"own {role.removeprefix('feature:')}" for role in records.training[0].fields}
        dataset = (replace(own.dataset[0], path="own.jsonl", columns=columns),)
        site.edit(dataset=dataset, limits=own.limits, allow=own.allow)

    federation.finish(kind, *given)

    check_whole(federation, kind, rounds=ROUNDS)
    # The simulation has not got the broken records.
    check_same_adapter(federation, kind, tmp_path / kind, tolerance=0)
