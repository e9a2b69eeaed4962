"""What is lost by a student of half the layers, by how many texts its teacher answers for it?  Banking77, MiniLM.

    python simulations/distill/run.py --runs RUNS                         every line, into results.json and README.md
    python simulations/distill/run.py --texts FILE --title "WORDS"        one more line, of other texts

There are no public texts of this kind, so that 3,000 questions of the train file stand in for them, without their
labels: those of the smallest hash, which no site gets.  The teacher is a run of the recipe `banks_intents` on the rest.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path

from fedtune.api.compose import compose_recipe
from fedtune.config import read_saved_config
from fedtune.lab.distillation import distill

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

DATA = study.ROOT / "simulations" / "data" / "banking77"
SIZES = (3000, 1500, 500)
STUDENT, PASSES = "half", 10


def teacher(folder: Path) -> Path:
    """The run on what is left of the train file; beside it the held-back questions, of each size a file."""
    rows = [json.loads(line) for line in gzip.decompress((DATA / "train.jsonl.gz").read_bytes()).splitlines()]
    rows.sort(key=lambda row: sha256(row["text"].encode()).digest())
    for size in SIZES:
        texts = (" ".join(row["text"].split()) for row in rows[:size])
        (folder / f"texts-{size}.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    rest = rows[max(SIZES) :]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest), encoding="utf-8")
    settings = {"data.train_file": str(folder / "train.jsonl"), "data.declared_sizes": len(rest) // 4 - 18}
    place = {"name": "teacher", "tracking.output_dir": str(folder), "tracking.progress": False}
    return study.finished(compose_recipe("simulations/recipes/banks_sampled.yaml", settings | place))


def taught(runs: Path, *, texts: str) -> study.Found:
    """A student taught on a file, and what it comes to on the test records."""
    folder = teacher(runs)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        to = Path(scratch) / "student"
        found = distill(
            read_saved_config(folder), folder / "adapter", to, student=STUDENT, texts=str(runs / texts), passes=PASSES
        )
    whole, small = found.served
    return {
        "texts": found.texts,
        "sha256": found.sha256,
        "student": STUDENT,
        "passes": PASSES,
        "records": found.records,
        "cpu_seconds": time.process_time() - began,
        "milliseconds": [whole.milliseconds, small.milliseconds],
        "bytes": [whole.bytes, small.bytes],
        "scores": {name: asdict(one) for name, one in found.scores.items()},
    }


def table(lines: Mapping[str, study.Found]) -> str:
    """The Markdown table: the teacher, and each student."""
    heads = ["", "texts", "passes", "accuracy", "difference to its teacher, 95 %", "macro-F1", "size", "ms per text"]
    first = next(iter(lines.values()))
    rows = [["the teacher", "", "", *_figures(first, "base", 0)]]
    for title, one in lines.items():
        change = one["scores"]["accuracy"]["difference"]
        figures = _figures(one, "tuned", 1)
        figures[1] = f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})"
        rows.append([title, f"{one['texts']:,}", str(one["passes"]), *figures])
    return readme.markdown([heads, *rows])


def _figures(one: study.Found, model: str, place: int) -> list[str]:
    scores = [f"{one['scores'][name][model]['value']:.4f}" for name in ("accuracy", "macro_f1")]
    return [scores[0], "", scores[1], f"{one['bytes'][place] / 2**20:.1f} MiB", f"{one['milliseconds'][place]:.1f}"]


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--texts", type=Path, help="other texts, one a line")
    options.add_argument("--title", default="other texts", help="of their line")
    asked = options.parse_args()
    files = {f"held back, {size:,}": f"texts-{size}.txt" for size in SIZES}
    if asked.texts:
        files[asked.title], asked.only = str(asked.texts.absolute()), [asked.title]
    lines: dict[str, study.Line] = {title: partial(taught, texts=texts) for title, texts in files.items()}
    study.carry_out(__file__, lines, table, asked=asked, measured=False)


if __name__ == "__main__":
    main()
