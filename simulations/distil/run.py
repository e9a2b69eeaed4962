"""What is lost by a student of half the layers, by how many texts its teacher answers for it?  Banking77, MiniLM.

    python simulations/distil/run.py                                     every line, into results.json and README.md
    python simulations/distil/run.py --texts FILE --title "WORDS"        one more line, of other texts

There are no public texts of this kind, so that 3,000 questions of the train file stand in for them, without their
labels: those of the smallest hash, which no site gets.  The teacher is a run of the recipe `banks_intents` on the rest.
After an interruption the same command goes on.  The run, texts and students are in runs/distil (--runs).
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedtune.api.compose import compose_recipe
from fedtune.config import RunConfig, saved_config
from fedtune.export.distillation import distil
from fedtune.privacy.durable import write_durably
from fedtune.studies.trials import Trial, run_quietly

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme

HERE = Path(__file__).parent
DATA = HERE.parent / "data" / "banking77"
SIZES = (3000, 1500, 500)


def teacher(folder: Path) -> tuple[RunConfig, Path]:
    """The run on what is left of the train file, and beside it the held-back questions, of each size a file."""
    rows = [json.loads(line) for line in gzip.decompress((DATA / "train.jsonl.gz").read_bytes()).splitlines()]
    rows.sort(key=lambda row: sha256(row["text"].encode()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        texts = (" ".join(row["text"].split()) for row in rows[:size])
        (folder / f"texts-{size}.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    rest = rows[max(SIZES) :]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest), encoding="utf-8")
    settings = {"data.train_file": str(folder / "train.jsonl"), "data.declared_sizes": len(rest) // 4 - 18}
    place = {"name": "teacher", "tracking.output_dir": str(folder)}
    if not (folder / "teacher" / "run.json").is_file():
        ran = Trial.of(compose_recipe("banks_intents", settings | place | {"tracking.progress": False})).run(
            run_quietly
        )
        if ran.error is not None:
            raise ran.error
    return saved_config(folder / "teacher"), folder / "teacher" / "adapter"


def line(config: RunConfig, adapter: Path, texts: Path, to: Path, *, student: str, passes: int) -> dict[str, Any]:
    """A student taught on a file, and what it comes to on the test records."""
    began = time.process_time()
    found = distil(config, adapter, to, student=student, texts=str(texts), passes=passes)
    whole, small = found.served
    return {
        "texts": found.texts,
        "sha256": found.sha256,
        "student": student,
        "passes": passes,
        "records": found.records,
        "cpu_seconds": time.process_time() - began,
        "milliseconds": [whole.milliseconds, small.milliseconds],
        "bytes": [whole.bytes, small.bytes],
        "scores": {name: asdict(one) for name, one in found.scores.items()},
    }


def page(results: dict[str, dict[str, Any]]) -> str:
    """The Markdown table: the teacher, and each student."""
    heads = ["", "texts", "passes", "accuracy", "difference to its teacher, 95 %", "macro-F1", "size", "ms a text"]
    first = next(iter(results.values()))
    rows = [["the teacher", "", "", *_figures(first, "base", 0)]]
    for title, one in results.items():
        change = one["scores"]["accuracy"]["difference"]
        figures = _figures(one, "tuned", 1)
        figures[1] = f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})"
        rows.append([title, f"{one['texts']:,}", str(one["passes"]), *figures])
    return readme.markdown([heads, *rows])


def _figures(one: dict[str, Any], model: str, place: int) -> list[str]:
    scores = [f"{one['scores'][name][model]['value']:.4f}" for name in ("accuracy", "macro_f1")]
    return [scores[0], "", scores[1], f"{one['bytes'][place] / 2**20:.1f} MiB", f"{one['milliseconds'][place]:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/distil"))
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--title", default="other texts")
    parser.add_argument("--student", default="half")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--validation", action="store_true", help="to tune by: score on it, and keep nothing")
    given = parser.parse_args()
    config, adapter = teacher(given.runs)
    if given.validation:
        config = replace(config, data=replace(config.data, test_file=config.data.validation_file))
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.is_file() and not given.validation else {}
    asked = {f"held back, {size:,}": given.runs / f"texts-{size}.txt" for size in SIZES}
    for title, texts in ({given.title: given.texts} if given.texts else asked).items():
        if title in results:
            continue
        to = given.runs / f"student-{time.strftime('%H%M%S')}-{len(results)}"
        results[title] = line(config, adapter, texts, to, student=given.student, passes=given.passes)
        print(title, json.dumps(results[title]["scores"]["accuracy"]), flush=True)
        if not given.validation:
            write_durably(file, json.dumps(results, indent=1).encode() + b"\n")
            readme.put(HERE / "README.md", page(results))


if __name__ == "__main__":
    main()
