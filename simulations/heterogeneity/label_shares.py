"""What the shipped partitions do to the labels of the four banks: a Markdown table for README.md.

    python simulations/heterogeneity/label_shares.py [--seed 0]

It assigns the records as a run with the same seed does, and trains nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune.api.compose import compose_run
from fedtune.sites.run_records import partition_run_records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from readme import markdown

RECIPES = {
    "banks_intents": "equal",
    "banks_dirichlet_05": "Dirichlet 0.5",
    "banks_dirichlet_01": "Dirichlet 0.1",
    "banks_by_label": "by label",
}
HEADING = ("partition", "bank", "records", "intents", "with half of the records", "largest share", "distance")


def describe(labels: Sequence[str], pooled: Counter[str]) -> list[str]:
    """Describe the labels of one site's records beside those of all sites' records."""
    counts = Counter(labels)
    reached, half = 0, 0
    for _, count in counts.most_common():
        if 2 * reached >= len(labels):
            break
        reached, half = reached + count, half + 1
    largest = max(counts.values()) / len(labels)
    # Total variation: the least share of the site's records whose label would have to change.
    distance = sum(abs(counts[label] / len(labels) - pooled[label] / pooled.total()) for label in pooled) / 2
    return [f"{len(labels):,}", str(len(counts)), str(half), f"{100 * largest:.1f} %", f"{distance:.2f}"]


def rows(seed: int) -> Iterator[list[str]]:
    for recipe, title in RECIPES.items():
        config = compose_run([f"experiment={recipe}", f"seed={seed}"])
        sites = [[one.fields["label"] for one in site.training] for site in partition_run_records(config).sites]
        pooled = Counter(label for labels in sites for label in labels)
        for name, labels in zip(config.federation.names, sites, strict=True):
            yield [title, name, *describe(labels, pooled)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=0)
    print(markdown([HEADING, *rows(options.parse_args().seed)], texts=2))


if __name__ == "__main__":
    main()
