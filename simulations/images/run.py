"""Four sites learn the digits 5 to 9 by a tiny vision transformer that knows 0 to 4: at epsilon 8, and without privacy.

    .venv/bin/python simulations/images/run.py                 into results.json and README.md
    .venv/bin/python simulations/images/run.py --seeds 1       one seed; what results.json has already is kept

It needs scikit-learn (the extra export brings it along) and the extra images, and takes minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import fedtune  # before torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
from pretrain import pretrain, write_images

HERE = Path(__file__).parent
SITES = 4
LABELS = ["five", "six", "seven", "eight", "nine"]
SECURE = {"federation.aggregation": "secure", "federation.threshold": SITES, "federation.min_sites": SITES}
LINES: dict[str, dict[str, Any]] = {
    "none": {"privacy": "none", "privacy.noise_multiplier": None},
    "epsilon 8": {"privacy.epsilon": 8.0},
    "epsilon 8, secure sums": {"privacy.epsilon": 8.0, **SECURE},
}


def trained(folder: Path, files: dict[str, Path], line: str, seed: int) -> dict[str, float]:
    """Accuracy before and after one run."""
    settings = {
        "model.path": str(folder / "model"), "data.train_file": str(files["train"]),
        "data.test_file": str(files["test"]), "data.labels": LABELS, "data.max_length": 17,
        "data.declared_sizes": 160, "federation.num_sites": SITES, "seed": seed,
        "tracking.output_dir": str(folder / "runs"), "tracking.progress": False, "runtime.num_threads": 1,
        "runtime.num_devices": 1, "privacy.delta": 1e-4, **LINES[line],
    }  # fmt: skip
    settings["name"] = re.sub("[ ,]+", "-", f"{line} {seed}")
    run = fedtune.simulate("own_images", settings)
    final = json.loads((Path(run.folder) / "run.json").read_text())["final"]
    return {"before": final["metrics_before"]["accuracy"], "after": final["metrics"]["accuracy"]}


def page(results: dict[str, Any]) -> str:
    """The Markdown table."""
    rows = [["line", "runs", "accuracy before", "accuracy after", "of each run"]]
    for line in LINES:
        found = [one for key, one in results.items() if key.rpartition(" ")[0] == line]
        if found:
            each = ", ".join(f"{one['after']:.3f}" for one in found)
            means = [statistics.fmean(one[when] for one in found) for when in ("before", "after")]
            rows.append([line, str(len(found)), *(f"{mean:.3f}" for mean in means), each])
    return readme.markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results["accuracy on 0 to 4"] = pretrain(folder / "model")
        files = write_images(folder)
        for seed in range(given.seeds):
            for line in LINES:
                if (key := f"{line} {seed}") not in results:
                    results[key] = trained(folder, files, line, seed)
                    print(key, results[key], flush=True)
                    file.write_text(json.dumps(results, indent=1) + "\n")
    readme.put(HERE / "README.md", page(results))


if __name__ == "__main__":
    main()
