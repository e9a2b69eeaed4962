"""Audit banks_intents as it is and broken, at three epsilons, into results.json and the table of the README.

python simulations/audit/run.py                     every line, each in a process of its own
python simulations/audit/run.py --only e1           lines whose keys begin with e1; others are kept
python simulations/audit/run.py --experiment debug --into FOLDER     a trial in a minute, results in FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from faults import FAULTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

from fedtune.cli.main import main as fedtune
from fedtune.privacy.accountant import format_epsilon

# What the lead scores on files of its own is no part of an audit.
COMMON = ("tracking=quiet", "data.validation_file=null", "data.test_file=null")
FEW = ("audit.canaries=1000",)
MANY = ("audit.canaries=15000", "audit.sites=[bank-a]")
LINES: dict[str, dict[str, Any]] = {
    f"e{epsilon}-{key}": {"epsilon": epsilon, "fault": fault, "audit": [*canaries, *guesses]}
    for epsilon, canaries, fewer in ((1, FEW, 100), (3, FEW, 100), (8, MANY, 750))
    for key, fault, guesses in (
        ("real", "none", ()),
        ("no_noise", "no noise", ()),
        ("no_clipping", "no clipping", ()),
        ("real_fewer_guesses", "none", (f"audit.guesses={fewer}",)),
    )
}
LINES["e8-records"] = {"epsilon": 8, "fault": "none", "audit": ["audit.kind=records", "audit.canaries=500"]}
NAMES = {"none": "fedtune", "no noise": "without noise", "no clipping": "without clipping"}


def in_own_process(runs: Path, *, key: str, experiment: str) -> study.Found:
    """Audit a line in a child process: a fault in it reaches nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: study.Found = pool.apply(audited, (key, experiment))
    if not as_expected(found):
        print(f"    NOT AS EXPECTED: exit code {found['exit_code']}", flush=True)
    return found


def audited(key: str, experiment: str) -> study.Found:
    """Break what is to be broken, audit, and return what was found."""
    line = LINES[key]
    FAULTS[line["fault"]]()
    audit = line["audit"]
    if experiment != "simulations/recipes/banks_sampled.yaml":  # a trial: an adapter of 6,000 values, and few steps
        kept = [one for one in audit if not one.startswith(("audit.canaries", "audit.guesses", "audit.sites"))]
        audit = [*kept, "audit.canaries=300"]
    overrides = [f"experiment={experiment}", *COMMON, f"privacy.epsilon={line['epsilon']}", *audit]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        code = fedtune(["audit", *overrides, f"name={key}", f"tracking.output_dir={scratch}"])
        written, ran = (json.loads((Path(scratch) / key / name).read_text()) for name in ("audit.json", "run.json"))
    site = next(iter(ran["privacy"]["sites"].values()))
    return {
        "ran": NAMES[line["fault"]],
        "overrides": overrides,
        "exit_code": code,
        "steps": site["steps"],
        "noise_multiplier": site["noise_multiplier"],
        "seconds": time.monotonic() - began,
        "audit": written,
    }


def as_expected(line: study.Found) -> bool:
    """fedtune keeps its claim, and everything broken is found."""
    wanted = 0 if line["ran"] == "fedtune" else 1
    return bool(line["exit_code"] == wanted and line["audit"]["exceeded"] == bool(wanted))


def table(lines: Mapping[str, study.Found]) -> str:
    """Format the table of bounds, each with its ceiling beside it, and the one of the baselines on real records."""
    heads = ["claimed", "what ran", "canaries", "guesses", "shown at a site", "ceiling", "shown on the average"]
    rows = [[*heads, "ceiling", "refuted", "seconds"]]
    for line in lines.values():
        bounds = line["audit"]["bounds"]
        sites, average = [bound for bound in bounds if bound["site"]], bounds[-1]
        shown = sorted(bound["lower_bound"] for bound in sites)
        kind = "" if line["audit"]["method"] == "gradient_canaries" else ", made-up records"
        rows.append(
            [
                format_epsilon(average["claimed_epsilon"]),
                line["ran"] + kind,
                f"{sites[0]['canaries']:,} at {len(sites)}",
                f"{sites[0]['guesses']:,}",
                f"{shown[0]:.2f}" if len(shown) == 1 else f"{shown[0]:.2f} to {shown[-1]:.2f}",
                f"{sites[0]['best_possible']:.2f}",
                f"{average['lower_bound']:.2f}",
                f"{average['best_possible']:.2f}",
                "yes" if line["audit"]["exceeded"] else "no",
                f"{line['seconds']:.0f}",
            ]
        )
    return readme.markdown(rows, texts=2) + membership(lines)


def membership(lines: Mapping[str, study.Found]) -> str:
    """Format the table of the baselines on real records, over all sites; nothing where no line has them."""
    rows = [["claimed", "guessed by", "AUROC", "found at 1 % false alarms", "at 0.1 %", "trained on", "never used"]]
    for line in lines.values():
        for one in line["audit"]["membership"]:
            if one["site"] is None:
                claim = format_epsilon(line["audit"]["bounds"][-1]["claimed_epsilon"])
                area = f"{one['auroc']:.3f} ({one['auroc_low']:.3f} to {one['auroc_high']:.3f})"
                found = [rate(hit) for hit in one["hit_rates"]]
                score = one["score"].replace("_", " ")
                rows.append([claim, score, area, *found, f"{one['members']:,}", f"{one['non_members']:,}"])
    return "\n\n" + readme.markdown(rows, texts=2) if len(rows) > 1 else ""


def rate(hit: study.Found) -> str:
    if hit["found"] is None:
        return "too few records"
    return f"{hit['found']:.2%} ({hit['low']:.2%} to {hit['high']:.2%})"


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--experiment", default="simulations/recipes/banks_sampled.yaml")
    asked = options.parse_args()
    lines: dict[str, study.Line] = {key: partial(in_own_process, key=key, experiment=asked.experiment) for key in LINES}
    study.carry_out(__file__, lines, table, asked=asked)


if __name__ == "__main__":
    main()
