"""Kill running federations with SIGKILL, and check that no ledger ever says less than what was done.

    python simulations/kill/run.py                            the study: 300 kills, into results.json and README.md here
    python simulations/kill/run.py --kills 20 --into FOLDER   a sample, into FOLDER/results.json, as `make test` does

Exit code 1 where a check failed, or where a ledger in a wrong order was not found out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Only a process with a single thread can be forked safely; numpy and torch read these when they are imported.
    os.environ.update(
        OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
    )
    sys.path.insert(0, str(HERE.parent))
    import campaign
    import readme

    with tempfile.TemporaryDirectory() as scratch:
        found = campaign.carry_out(options.kills, Path(scratch), seed=options.seed)
    text = campaign.table(found)
    print(text)
    print(*found["problems"], sep="\n")
    if options.into == HERE:
        text = f"{text}\n\n{summary(found)}"
        readme.put(HERE / "README.md", text, begin="<!-- results: written by simulations/kill/run.py -->")
    campaign.write(options.into, found)
    missed = [order for order in found["broken_orders"] if not order["found"]]
    thin = [phase for phase, counts in found["phases"].items() if counts.get("named", 0) and counts["all"] < 10]
    if found["problems"] or missed or (thin and options.into == HERE):
        raise SystemExit(
            f"{len(found['problems'])} checks failed; wrong orders that were not found out: {missed}; "
            f"fewer than ten kills in: {thin}"
        )


def summary(found: dict[str, object]) -> str:
    """The line below the table."""
    return (
        f"{found['kills']} kills in {found['runs']} runs ({found['processes']} processes) in {found['seconds']} s; "
        f"{len(found['problems']) or 'no'} checks failed. Python {found['python']}, SQLite {found['sqlite']}, "
        f"{found['hardware']}."
    )


if __name__ == "__main__":
    main()
