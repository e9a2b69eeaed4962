"""Three public tables over four sites: secure aggregation at epsilon 3 beside the same training in one place, and
others.

    python simulations/tables/run.py              five times five-fold, into results.json and README.md
    python simulations/tables/run.py --missing    folds that results.json lacks

It needs scikit-learn (the extra export brings it along).
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fedtune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

SITES, FOLDS, TIMES, EPSILON = 4, 5, 5, 3.0
STEPS, RATE = 60, 0.3
WAYS = ("federated", "pooled", "alone", "library")
# Published with the data sets, rounded: nothing is taken from the records of a run.
CELLS = {
    "radius": (5, 40), "texture": (5, 50), "perimeter": (40, 260), "area": (100, 4300), "smoothness": (0.05, 0.25),
    "compactness": (0, 1.1), "concavity": (0, 1.3), "concave points": (0, 0.3), "symmetry": (0.1, 0.7),
    "fractal dimension": (0.04, 0.21),
}  # fmt: skip
ERRORS = {
    "radius": (0, 3), "texture": (0, 5), "perimeter": (0, 22), "area": (0, 550), "smoothness": (0, 0.035),
    "compactness": (0, 0.14), "concavity": (0, 0.4), "concave points": (0, 0.06), "symmetry": (0, 0.08),
    "fractal dimension": (0, 0.03),
}  # fmt: skip
BLOOD = {
    "age": (18, 80), "bmi": (15, 45), "bp": (60, 140), "s1": (80, 310), "s2": (30, 250), "s3": (20, 100),
    "s4": (2, 10), "s5": (3, 6.5), "s6": (50, 130),
}  # fmt: skip


def breast_cancer() -> tuple[Any, list[str], Any, dict[str, Any]]:
    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    features = []
    for name in names:
        kind = name.removeprefix("mean ").removeprefix("worst ").removesuffix(" error")
        low, high = (ERRORS if name.endswith(" error") else CELLS)[kind]
        features.append({"columns": [name], "range": [low, high]})
    answers = [str(data.target_names[one]) for one in data.target]
    return data.data, names, answers, {"data.features": features, "data.labels": ["malignant", "benign"]}


def digits() -> tuple[Any, list[str], Any, dict[str, Any]]:
    data = load_digits()
    names = [f"pixel {place}" for place in range(64)]
    settings = {"data.features": [{"columns": names, "range": [0, 16]}], "data.labels": [str(one) for one in range(10)]}
    return data.data, names, [str(one) for one in data.target], settings


def diabetes() -> tuple[Any, list[str], Any, dict[str, Any]]:
    data = load_diabetes(scaled=False)
    names = list(map(str, data.feature_names))
    features: list[dict[str, Any]] = [{"columns": [name], "range": list(ends)} for name, ends in BLOOD.items()]
    features.append({"columns": ["sex"], "categories": ["1", "2"]})
    settings = {"data.features": features, "data.labels": [], "task": "regression", "data.target_range": [25, 350]}
    return data.data, names, list(map(float, data.target)), settings | {"training.learning_rate": 0.3}


TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "breast_cancer": (breast_cancer, "accuracy"),
    "digits": (digits, "accuracy"),
    "diabetes": (diabetes, "pearson"),
}


def write(file: Path, names: list[str], rows: Any, answers: list[Any]) -> None:
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow([*names, "answer"])
        table.writerows([*map(float, row), answer] for row, answer in zip(rows, answers, strict=True))


def fold(runs: Path, *, name: str, times: int, number: int) -> study.Found:
    """The score of each way to train on one fold."""
    (make, score), found = TABLES[name], dict[str, float]()
    rows, names, answers, settings = make()
    split = list(KFold(FOLDS, shuffle=True, random_state=times).split(rows))[number]
    train, test = split
    own = np.array_split(np.random.default_rng(times).permutation(train), SITES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for site, some in enumerate([*own, train, test], 1):
            write(folder / f"site-{site}.csv", names, rows[some], [answers[one] for one in some])
        role = "target" if settings.get("task") == "regression" else "label"
        size = len(train) // SITES
        common = {
            "data.test_file": str(folder / f"site-{SITES + 2}.csv"), "data.columns": {role: "answer"},
            "privacy.epsilon": EPSILON, "privacy.sampling_rate": RATE, "federation.num_rounds": STEPS,
            "training.local_steps": 1, "training.learning_rate": 10.0, "head.scale": 5.0, "tracking.progress": False,
            "tracking.output_dir": scratch, "runtime.num_threads": 1, "runtime.num_devices": 1, "seed": times,
            **settings,
        }  # fmt: skip
        secure = {"federation.aggregation": "secure", "federation.threshold": SITES, "federation.min_sites": SITES}
        by_site = {"data.train_file": str(folder / "site-{site}.csv"), "data.partition.kind": "file"}
        for line, changes in {
            "federated": secure | by_site | {"federation.num_sites": SITES, "data.declared_sizes": size}
            | {"federation.site_names": [str(site) for site in range(1, SITES + 1)]},
            "pooled": {"data.train_file": str(folder / f"site-{SITES + 1}.csv"), "federation.num_sites": 1}
            | {"data.declared_sizes": SITES * size},
            "alone": {"data.train_file": str(folder / "site-1.csv"), "federation.num_sites": 1}
            | {"data.declared_sizes": size},
        }.items():  # fmt: skip
            run = fedtune.simulate("own_features", common | changes | {"name": line})
            found[line] = float(run.metrics[score])
    truth = [answers[one] for one in test]
    if score == "pearson":
        said = LinearRegression().fit(rows[train], [answers[one] for one in train]).predict(rows[test])
        found["library"] = float(np.corrcoef(said, truth)[0, 1])
    else:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        found["library"] = float(model.fit(rows[train], [answers[one] for one in train]).score(rows[test], truth))
    return found


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table: means over folds."""
    rows = [["table", "score", "folds", "federated", "pooled", "federated - pooled", "alone", "without privacy"]]
    for name, (_, score) in TABLES.items():
        found = [one for key, one in lines.items() if key.startswith(f"{name} ")]
        if not found:
            continue
        apart = [one["federated"] - one["pooled"] for one in found]
        half = 1.96 * statistics.stdev(apart) / len(apart) ** 0.5 if found[1:] else float("nan")
        means = {line: statistics.fmean(one[line] for one in found) for line in WAYS}
        difference = f"{statistics.fmean(apart):+.4f} ± {half:.4f}"
        shown = [f"{means[line]:.4f}" for line in WAYS]
        rows.append([name, score, str(len(found)), *shown[:2], difference, *shown[2:]])
    return readme.markdown(rows, texts=2)


def main() -> None:
    asked = study.parser(__doc__, Path(__file__).parent).parse_args()
    lines: dict[str, study.Line] = {
        f"{name} {times} {number}": partial(fold, name=name, times=times, number=number)
        for times, number, name in product(range(TIMES), range(FOLDS), TABLES)
    }
    study.carry_out(__file__, lines, table, asked=asked, measured=False)


if __name__ == "__main__":
    main()
