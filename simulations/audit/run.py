"""Audit banks_intents as it is and broken, at three epsilons, into results.json and the table of the README.

python simulations/audit/run.py                     every line, one after the other, each in a process of its own
python simulations/audit/run.py --only e1           lines whose key begins with e1; others are kept
python simulations/audit/run.py --experiment debug --output FOLDER     a trial in a minute, results in FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faults import FAULTS

from fedtune.cli.main import main as fedtune
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.durable import write_durably

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by simulations/audit/run.py -->", "<!-- end of results -->"
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


def in_own_process(key: str, experiment: str) -> dict[str, Any]:
    """One line, in a child process: a fault in it reaches nothing else."""
    command = [sys.executable, __file__, "--line", key, "--experiment", experiment]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{key}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_line(key: str, experiment: str) -> dict[str, Any]:
    """Break what is to be broken, audit, and return what was found."""
    line = LINES[key]
    FAULTS[line["fault"]]()
    audit = [one for one in line["audit"] if experiment == "banks_intents" or not one.startswith("audit.sites")]
    if experiment != "banks_intents":  # a trial: an adapter of 6,000 values, and few steps
        audit = [*(one for one in audit if "canaries" not in one and "guesses" not in one), "audit.canaries=300"]
    overrides = [f"experiment={experiment}", *COMMON, f"privacy.epsilon={line['epsilon']}", *audit]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        code = fedtune(["audit", *overrides, f"name={key}", f"tracking.output_dir={scratch}"])
        written = json.loads((Path(scratch) / key / "audit.json").read_text())
        ran = json.loads((Path(scratch) / key / "run.json").read_text())
    site = next(iter(ran["privacy"]["sites"].values()))
    return {
        "ran": NAMES[line["fault"]],
        "overrides": overrides,
        "exit_code": code,
        "steps": site["steps"],
        "noise_multiplier": site["noise_multiplier"],
        "seconds": time.monotonic() - began,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "audit": written,
    }


def as_expected(line: dict[str, Any]) -> bool:
    """fedtune keeps its claim, and everything broken is found."""
    wanted = 0 if line["ran"] == "fedtune" else 1
    return bool(line["exit_code"] == wanted and line["audit"]["exceeded"] == bool(wanted))


def table(lines: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of bounds, each with its ceiling beside it."""
    heads = [
        "claimed",
        "what ran",
        "canaries",
        "guesses",
        "shown at a site",
        "ceiling",
        "shown on the average",
        "ceiling",
    ]
    heads += ["refuted", "seconds"]
    rows = [heads, ["---:", "---"] + ["---:"] * (len(heads) - 4) + ["---", "---:"]]
    for line in lines.values():
        bounds = line["audit"]["bounds"]
        sites, average = [bound for bound in bounds if bound["site"]], bounds[-1]
        shown = sorted(bound["lower_bound"] for bound in sites)
        kind = "" if line["audit"]["method"] == "gradient_canaries" else ", made-up records"
        rows.append(
            [
                epsilon_text(average["claimed_epsilon"]),
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
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def membership(lines: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of the baselines on real records, over all sites."""
    rows = [["claimed", "guessed by", "AUROC", "found at 1 % false alarms", "at 0.1 %", "trained on", "never used"]]
    rows.append(["---:", "---", *["---:"] * 5])
    for line in lines.values():
        for one in line["audit"]["membership"]:
            if one["site"] is None:
                claim = epsilon_text(line["audit"]["bounds"][-1]["claimed_epsilon"])
                area = f"{one['auroc']:.3f} ({one['auroc_low']:.3f} to {one['auroc_high']:.3f})"
                found = [rate(hit) for hit in one["hit_rates"]]
                score = one["score"].replace("_", " ")
                rows.append([claim, score, area, *found, f"{one['trained_on']:,}", f"{one['never_used']:,}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) if len(rows) > 2 else ""


def rate(hit: dict[str, Any]) -> str:
    if hit["found"] is None:
        return "too few records"
    return f"{hit['found']:.2%} ({hit['low']:.2%} to {hit['high']:.2%})"


def write(folder: Path, lines: dict[str, dict[str, Any]]) -> None:
    """Write results.json, and the tables between the README's marks where there is one."""
    write_durably(folder / "results.json", json.dumps({"lines": lines}, indent=1).encode() + b"\n")
    readme = folder / "README.md"
    if not readme.exists():
        print(table(lines), membership(lines), sep="\n\n")
        return
    before, rest = readme.read_text().split(BEGIN)
    machines = sorted({line["hardware"] for line in lines.values()})
    parts = [part for part in (table(lines), membership(lines), f"Measured on {'; '.join(machines)}.") if part]
    text = before + "\n\n".join([f"{BEGIN}\n{parts[0]}", *parts[1:]]) + "\n" + END + rest.split(END)[1]
    write_durably(readme, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--experiment", default="banks_intents")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line:
        print(json.dumps(run_line(options.line, options.experiment)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.json"
    old = json.loads(path.read_text())["lines"] if path.exists() else {}
    for key in (key for key in LINES if key.startswith(options.only)):
        print(f"--- {key}", flush=True)
        old[key] = in_own_process(key, options.experiment)
        if not as_expected(old[key]):
            print(f"    NOT AS EXPECTED: exit code {old[key]['exit_code']}", flush=True)
        write(options.output, {key: old[key] for key in LINES if key in old})


if __name__ == "__main__":
    main()
