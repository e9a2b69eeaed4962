"""Do federated algorithms help where sites differ?  Banking77 and medical abstracts, on equal and on skewed sites,
without privacy and at epsilon 8.

    python simulations/heterogeneity/run.py --runs runs/heterogeneity             every row, into results.json
    python simulations/heterogeneity/run.py --runs runs/heterogeneity --missing   go on after an interruption
    python simulations/heterogeneity/run.py --only banking-e8-skewed              rows whose keys begin so
    python simulations/heterogeneity/run.py --smoke --into FOLDER                 two rows of a tiny model, in a minute

A row is one algorithm on one partition of one data set at one epsilon: the mean of three seeds, written as soon as it
is computed.  With OMP_NUM_THREADS=1, two processes that compute different rows (`--only banking`, `--only abstracts`)
use two cores better than one process does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study
from shared_states import shared_frozen_states

from fedtune.sites.run_cache import RunCache

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
    "equal": ("equal sites", ("data.partition.kind=iid",)),
    "skewed": ("Dirichlet 0.1", ("data.partition.kind=dirichlet", "data.partition.alpha=0.1")),
}


@dataclass(frozen=True)
class DataSet:
    """A data set with its recipe.

    Attributes:
        title: its name in the table.
        experiment: the experiment that the recipe shortens.
        overrides: settings of all its rows.
        privacy: title and settings by privacy.
        both: further settings by privacy, where A and B train.
    """

    title: str
    experiment: str
    overrides: tuple[str, ...]
    privacy: Mapping[str, tuple[str, tuple[str, ...]]]
    both: Mapping[str, tuple[str, ...]]


DATA_SETS: Mapping[str, DataSet] = {
    "banking": DataSet(
        "Banking77",
        "simulations/recipes/banks_sampled.yaml",
        ("federation.num_rounds=4", "training.local_steps=4", "privacy.sampling_rate=0.1", "data.max_length=32"),
        {"none": ("without privacy", ("privacy=none",)), "e8": ("epsilon 8", ("privacy.epsilon=8",))},
        # Without clipping, A and B together diverge at the rate of B alone: a quarter, as in simulations/aggregation.
        {"none": ("training.unclipped_learning_rate=2",)},
    ),
    "abstracts": DataSet(
        "abstracts",
        "hospitals_abstracts",
        (
            "federation.num_rounds=4",
            "training.local_steps=4",
            "privacy.sampling_rate=0.2",
            "data.max_length=48",
            "data.declared_sizes=680",
            "data.partition.proportions=[]",
        ),
        {
            "none": (
                "without privacy",
                ("privacy=none", "training.learning_rate=0.25", "training.head_learning_rate=0.5"),
            ),
            "e8": ("epsilon 8", ("privacy.epsilon=8",)),
        },
        {},
    ),
}
SEEDS = (0, 1, 2)
SMOKE = ("training=sgd", "training.ignore_weak_signal=true", "training.local_steps=2")


def rows(*, smoke: bool, cache: RunCache) -> Iterator[tuple[str, study.Line]]:
    """Yield each row's key and the function that computes it."""
    for name, data in DATA_SETS.items():
        for (privacy, price), (partition, skew), (algorithm, own) in product(
            data.privacy.items(), PARTITIONS.items(), ALGORITHMS.items()
        ):
            key = f"{name}-{privacy}-{partition}-{algorithm}"
            if smoke and key not in {"banking-e8-skewed-fedavg", "banking-e8-skewed-scaffold"}:
                continue
            shared = SMOKE if smoke else data.overrides
            more = data.both.get(privacy, ()) if set(BOTH) <= set(own[1]) else ()
            line: study.Found = {
                "key": key,
                "title": f"{data.title}, {price[0]}, {skew[0]}: {own[0]}",
                "overrides": [*shared, *price[1], *skew[1], *own[1], *more],
                "seeds": SEEDS[:1] if smoke else SEEDS,
            }
            experiment = "debug" if smoke else data.experiment
            yield key, partial(study.run_line, experiment=experiment, line=line, cache=cache)


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--smoke", action="store_true", help="two rows of a tiny model; give --into")
    asked = options.parse_args()
    if asked.smoke and asked.into == Path(__file__).parent:
        options.error("--smoke needs --into FOLDER: its rows are no results")
    with RunCache() as cache, shared_frozen_states():
        study.carry_out(__file__, dict(rows(smoke=asked.smoke, cache=cache)), study.table, asked=asked)


if __name__ == "__main__":
    main()
