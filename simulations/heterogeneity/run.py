"""Do federated algorithms help where sites differ?  Four banks on Banking77, equal and skewed, without privacy and at
epsilon 8.

    python simulations/heterogeneity/run.py --runs runs/heterogeneity             every row, into results.json
    python simulations/heterogeneity/run.py --runs runs/heterogeneity --missing   go on after an interruption
    python simulations/heterogeneity/run.py --only e8-skewed                      rows whose keys begin so
    python simulations/heterogeneity/run.py --smoke --into FOLDER                 two rows of a tiny model, in a minute

A row is one algorithm on one partition at one epsilon: the mean of three seeds, written as soon as it is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study

BOTH = ("lora.train_a=true",)
ALGORITHMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fedavg": ("FedAvg", ()),
    "fedprox": ("FedProx, mu 0.01", ("federation.algorithm=fedprox", "federation.algorithm_settings.mu=0.01")),
    "scaffold": ("SCAFFOLD", ("federation.algorithm=scaffold",)),
    "fedadam": (
        "FedAdam, rate 0.01",
        ("federation.algorithm=fedadam", "federation.algorithm_settings.server_learning_rate=0.01"),
    ),
    "fedavg-both": ("FedAvg, A and B", BOTH),
    "aslora": ("AS-LoRA, A or B", (*BOTH, "federation.algorithm=aslora")),
}
PARTITIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "equal": ("equal sites", ()),
    "skewed": ("Dirichlet 0.1", ("data.partition.kind=dirichlet", "data.partition.alpha=0.1")),
}
PRIVACY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "none": ("without privacy", ("privacy=none",)),
    "e8": ("epsilon 8", ("privacy.epsilon=8",)),
}
SEEDS = (0, 1, 2)
SMOKE = ("training=sgd", "training.ignore_weak_signal=true", "training.local_steps=2")


def rows(*, smoke: bool) -> Iterator[tuple[str, study.Line]]:
    """Yield each row's key and the function that computes it."""
    for (privacy, price), (partition, skew), (name, own) in product(
        PRIVACY.items(), PARTITIONS.items(), ALGORITHMS.items()
    ):
        key = f"{privacy}-{partition}-{name}"
        if smoke and (privacy, partition, name) not in {("e8", "skewed", "fedavg"), ("e8", "skewed", "scaffold")}:
            continue
        line: study.Found = {
            "key": key,
            "title": f"{price[0]}, {skew[0]}: {own[0]}",
            "overrides": [*price[1], *skew[1], *own[1], *(SMOKE if smoke else ())],
            "seeds": SEEDS[:1] if smoke else SEEDS,
        }
        yield key, partial(study.run_line, experiment="debug" if smoke else "banks_intents", line=line)


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--smoke", action="store_true", help="two rows of a tiny model; give --into")
    asked = options.parse_args()
    if asked.smoke and asked.into == Path(__file__).parent:
        options.error("--smoke needs --into FOLDER: its rows are no results")
    study.carry_out(__file__, dict(rows(smoke=asked.smoke)), study.table, asked=asked)


if __name__ == "__main__":
    main()
