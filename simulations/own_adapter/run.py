"""Is a site's own adapter better than the shared one and the site alone?  On test records weighted to the site's mix.

    python simulations/own_adapter/run.py                  every line, into results.json and README.md
    python simulations/own_adapter/run.py --seeds 0        fewer; what results.json has already is kept

After an interruption the same command goes on: with the run, and then with the site, at which it stopped.

The site's mix is the share of each label among its records.  A test record counts by that share over the label's share
of the test file.  Own is compared with the better one of shared and alone, chosen on these same records, so that the
difference is a little lower than it is.  Run folders are in runs/own_adapter (--runs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.api.compose import compose_recipe
from fedtune.config import saved_config
from fedtune.data.load import split_key
from fedtune.privacy.durable import write_durably
from fedtune.runs.model_comparison import Finished, side_by_side
from fedtune.sites.personal import Parts, personalise
from fedtune.sites.run_records import deal_out
from fedtune.studies.trials import Trial, run_quietly

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme

HERE = Path(__file__).parent
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "four banks": ("banks_intents", {}),
    "four banks, skewed labels": ("banks_intents", {"data.partition.kind": "dirichlet", "data.partition.alpha": 0.5}),
    "three hospitals, skewed labels": ("hospitals_abstracts", {}),
    "16 banks": (
        "banks_intents",
        {
            "federation.num_sites": 16,
            "federation.site_names": [f"bank-{number}" for number in range(1, 17)],
            "data.declared_sizes": 540,
        },
    ),
}
DRAWS = 1000


def sites(
    recipe: str, settings: dict[str, Any], *, seed: int, folder: Path, done: Container[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each site's weighted accuracies, and own less the better one of the others with its interval; not of `done`."""
    place = {"name": folder.name, "tracking.output_dir": str(folder.parent), "tracking.progress": False}
    asked = compose_recipe(recipe, {"seed": seed, **settings, **place})
    if all(site in done for site in asked.federation.names):
        return  # the run's folder may be gone
    ran = Trial.of(asked).run(run_quietly)
    if ran.error is not None:
        raise ran.error
    config, adapter = saved_config(folder), folder / "adapter"
    for site, records in zip(config.federation.names, deal_out(config).sites, strict=True):
        if site in done:
            continue
        parts = Parts.of(records, key=split_key(config.seed), unit=config.privacy.unit)
        with tempfile.TemporaryDirectory() as scratch:
            into, alone = Path(scratch, "own"), Path(scratch, "alone")
            beside = {"into": into, "alone": alone, "beside_ledger": Path(scratch), "label": ""}
            own = personalise(config, adapter, parts, site=site, **beside)
            folders = {"own": into / "adapter", "shared": adapter, "alone": alone}
            runs = {name: Finished(folder=into, config=config, adapter=one) for name, one in folders.items()}
            sides = side_by_side(runs)
        mix = Counter(record.fields["label"] for record in records.training)
        test = Counter(record.fields["label"] for record in sides.records)
        weights = np.array([mix[one.fields["label"]] / test[one.fields["label"]] for one in sides.records])
        right = {name: one.examples["truth"] == one.examples["predicted"] for name, one in sides.measured.items()}
        score = {name: float(np.average(one, weights=weights)) for name, one in right.items()}
        best = max(("shared", "alone"), key=score.__getitem__)
        draws = np.random.default_rng(0).integers(len(weights), size=(DRAWS, len(weights)))
        gains = weights * (right["own"].astype(float) - right[best])
        drawn = gains[draws].sum(axis=1) / weights[draws].sum(axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        yield (
            site,
            {
                **score,
                "gain": score["own"] - score[best],
                "low": float(low),
                "high": float(high),
                "passes": own.fitted.passes,
                "records": len(records.training),
            },
        )


def page(results: dict[str, dict[str, Any]]) -> str:
    """The Markdown table: a line for each recipe, means over its sites and seeds."""
    heads = [
        "run",
        "seeds",
        "sites",
        "base",
        "alone",
        "shared",
        "own",
        "own - better one",
        "lowest site",
        "sites worse",
    ]
    lines = [heads]
    for name in RECIPES:
        of_recipe = {key: one for key, one in results.items() if key.startswith(f"{name}, seed ")}
        found = [site for one in of_recipe.values() for site in one.values()]
        if not found:
            continue
        scores = [
            f"{statistics.fmean(site[score] for site in found):.4f}" for score in ("base", "alone", "shared", "own")
        ]
        gains = [site["gain"] for site in found]
        worse = sum(site["high"] < 0 for site in found)
        ends = [f"{statistics.fmean(gains):+.4f}", f"{min(gains):+.4f}", f"{worse} of {len(found)}"]
        lines.append([name, str(len(of_recipe)), str(len(found)), *scores, *ends])
    return readme.markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lines", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--runs", type=Path, default=Path("runs/own_adapter"))
    given = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for seed in given.seeds:
        for name in given.lines:
            found = results.setdefault(f"{name}, seed {seed}", {})
            recipe, settings = RECIPES[name]
            folder = given.runs / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
            for site, scores in sites(recipe, settings, seed=seed, folder=folder, done=found.keys()):
                found[site] = scores
                print(f"{name}, seed {seed}, {site}", json.dumps(scores), flush=True)
                write_durably(file, json.dumps(results, indent=1).encode() + b"\n")
            readme.put(HERE / "README.md", page(results))


if __name__ == "__main__":
    main()
