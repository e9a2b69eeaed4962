"""Banking77 from texts that a privately tuned model wrote: how good is a classifier that saw no real question?

    python simulations/synthetic_texts/run.py --runs RUNS            all; what is finished in RUNS is taken from there
    python simulations/synthetic_texts/run.py --runs RUNS --only secure-e5    one line; the others stay

Four banks tune SmolLM2 to write a question for an intent.  It writes 3,000, and MiniLM learns the intents from them,
tested on the 3,080 real test questions.  Beside them: texts of the model that nobody tuned, by the same prompts; and a
third of the texts, those with most votes, where each of the banks' questions votes once for the nearest of all texts;
and all texts with the labels that a private classifier of the same banks gives them.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fedtune
from fedtune.evaluation.spec import WritingSpec
from fedtune.privacy.durable import write_durably
from fedtune.runs.saved_model import BASE, SavedModel
from fedtune.studies.synthetic import Synthetic, as_written, chosen, labelled, synthesize

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import readme  # noqa: E402
from kept_runs import asked, finished  # noqa: E402

SOURCE = HERE.parent / "data" / "banking77"
ROWS, KEPT = 3000, 1000
DRAWN = WritingSpec(max_new_tokens=40, temperature=0.7, top_p=0.95)
GUIDED = replace(DRAWN, guidance=1.0)
BANKS = {
    "data.dataset": "banking77",
    "federation.num_sites": 4,
    "federation.site_names": ["bank-a", "bank-b", "bank-c", "bank-d"],
    "data.declared_sizes": 2300,
    "tracking": "quiet",
}
WRITER = {
    "data.columns": {"prompt": "intent", "completion": "text"},
    "data.prompt_template": "A customer of a bank asks about {prompt}:\n",
    "data.max_length": 64,
    "data.validation_file": None,
    "data.test_rows": 300,
    "evaluation.generate": False,
    "model.dtype": "mixed",
}
SECURE = {
    "federation.aggregation": "secure",
    "federation.num_rounds": 16,
    "training.local_steps": 1,
    "privacy.sampling_rate": 0.1,
}
PLAIN = {"federation.aggregation": "plain", "federation.num_rounds": 4, "training.local_steps": 4}
LARGE = {"federation.num_rounds": 40, "privacy.sampling_rate": 0.25, "training.learning_rate": 300.0}
NONE = {
    "privacy": "none",
    "privacy.sampling_rate": 0.0139,
    "training": "adamw",
    "training.schedule": "linear",
    "training.local_steps": 36,
    "federation.num_rounds": 6,
    "lora.rank": 16,
    "lora.alpha": 32,
    "lora.train_a": True,
    "lora.target_modules": "all-linear",
}
WRITERS: dict[str, dict[str, Any]] = {
    **{f"secure-e{epsilon}": {**SECURE, "privacy.epsilon": epsilon} for epsilon in (8, 5, 2)},
    "secure-e8-faster": {**SECURE, "privacy.epsilon": 8, "training.learning_rate": 400.0},
    "secure-e8-large": {**SECURE, "privacy.epsilon": 8, **LARGE},
    "plain-e8": {**SECURE, "privacy.epsilon": 8, **PLAIN},
    "three-epochs": {**NONE, "training.unclipped_learning_rate": 0.001},
    "six-epochs": {**NONE, "training.unclipped_learning_rate": 0.0015, "model.adapter": "three-epochs"},
}
TITLES = (
    "untuned",
    *(f"secure-e8{way}{votes}" for way in ("", "-guided") for votes in ("", ", most votes")),
    "secure-e8, labels of epsilon 1",
    "secure-e8-faster",
    *(f"secure-e8-large{way}" for way in ("", "-guided", ", labels of epsilon 1")),
    "plain-e8",
    "secure-e5",
    "secure-e5, labels of epsilon 3",
    "secure-e2",
    "secure-e2, labels of epsilon 6",
    "secure-e2, labels of epsilon 1",
    "three-epochs",
    "six-epochs",
)
VOTES = {
    "data.columns": {"text": "both"},
    "data.max_length": 96,
    "federation.aggregation": "secure",
    "privacy.epsilon": 1,
}
# A quarter of the recipe's rates, chosen on the validation file: poor texts overrule the labels' names else.
CLASSIFIER = {
    "privacy": "none",
    "federation.num_sites": 1,
    "federation.site_names": ["synthetic"],
    "tracking": "quiet",
    "training.unclipped_learning_rate": 2.0,
    "training.unclipped_head_learning_rate": 3.5,
}
JUDGE = {
    "privacy": "none",
    "federation.num_sites": 1,
    "federation.site_names": ["all"],
    "data.train_file": str(SOURCE / "train.jsonl.gz"),
    "data.declared_sizes": 9275,
    "tracking": "quiet",
}


def files(into: Path) -> dict[str, Path]:
    """The questions with their intents in words; `both` has intent and question as one text; the intents alone."""
    into.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in ("train", "validation"):
        with gzip.open(SOURCE / f"{name}.jsonl.gz", "rt") as stream:
            rows[name] = [with_intent(json.loads(line)) for line in stream]
    rows["codes"] = [{"intent": intent} for intent in sorted({row["intent"] for row in rows["train"]})]
    rows["both"] = [{"both": both(row)} for row in rows["train"]]
    return {name: write(into / f"{name}.jsonl", found) for name, found in rows.items()}


def with_intent(row: dict[str, str]) -> dict[str, str]:
    return {"intent": row["label"].replace("_", " ").replace("?", "").lower(), **row}


def both(row: Mapping[str, str]) -> str:
    return f"{row['intent']}: {row['text']}"


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn_by(run: fedtune.Run, codes: Path, *, rows: int, base: bool = False, drawn: WritingSpec = DRAWN) -> Synthetic:
    """Texts of a run's model, or of the model before training."""
    use: Callable[..., None] = SavedModel.use
    SavedModel.use = (lambda self, name: use(self, BASE)) if base else use  # type: ignore[method-assign]
    made = synthesize(run, codes, rows=rows, spec=drawn)
    SavedModel.use = use  # type: ignore[method-assign]
    print(run.folder.name, len(made.rows), made.left_out, flush=True)
    return made


def written(
    path: Path, run: fedtune.Run, codes: Path, *, rows: int, base: bool = False, drawn: WritingSpec = DRAWN
) -> None:
    """Such texts with the labels' own names, in a file."""
    if not path.exists():
        made = drawn_by(run, codes, rows=rows, base=base, drawn=drawn)
        with gzip.open(SOURCE / "train.jsonl.gz", "rt") as stream:
            labels = {with_intent(row)["intent"]: row["label"] for row in map(json.loads, stream)}
        write(path, [{**row, "label": labels[row["intent"]]} for row in made.rows])


def voted(runs: Path, name: str, texts: Path, made: Mapping[str, Path]) -> tuple[fedtune.Run, Path]:
    """The texts that have most votes, and the run of the votes."""
    rows = [{**row, "both": both(row)} for row in read(texts)]
    candidates = list(dict.fromkeys(row["both"] for row in rows))
    ballot = {
        "data.train_file": str(made["both"]),
        "data.labels": [f"t{number:05}" for number in range(len(candidates))],
        "head.label_texts": candidates,
    }
    run = finished(runs, name, "votes", {**BANKS, **VOTES, **ballot})
    return write(
        texts.with_name(f"{name}.jsonl"), chosen(as_written(rows, ("intent", "both")), "both", run, keep=KEPT).rows
    )


def labelled_by(runs: Path, texts: Path, epsilon: int) -> tuple[fedtune.Run, Path]:
    """The texts with the labels that a classifier gives them, which the banks tune by secure sums, and its run."""
    settings = {**BANKS, "federation.aggregation": "secure", "privacy.epsilon": epsilon}
    classifier = finished(runs, f"labels-e{epsilon}", "banks_intents", settings)
    path = texts.with_name(f"{texts.stem}-labels-e{epsilon}.jsonl")
    return classifier, write(path, labelled(as_written(read(texts), ("intent", "text")), "text", classifier).rows)


def scored(runs: Path, texts: Path, judge: fedtune.Run) -> dict[str, float]:
    """What a classifier learns from texts, and the share whose label a classifier of the real questions gives too."""
    rows = read(texts)
    own = {"data.train_file": str(texts), "data.declared_sizes": len(rows)}
    run = finished(runs, f"classifier-{texts.stem}", "banks_intents", {**CLASSIFIER, **own})
    judged = judge.predict([row["text"] for row in rows])
    right = sum(found[0]["label"] == row["label"] for found, row in zip(judged, rows, strict=True))  # type: ignore[index]
    return {"texts": len(rows), "labelled_right": right / len(rows), **run.metrics}


def main() -> None:
    (runs, only), path = asked(__doc__, TITLES), HERE / "results.json"
    made = files(runs / "files")
    judge = finished(runs, "judge", "banks_intents", JUDGE)
    lines: dict[str, dict[str, Any]] = json.loads(path.read_text()) if only else {}
    shared = {**BANKS, **WRITER, "data.train_file": str(made["train"]), "data.test_file": str(made["validation"])}
    for title in only or TITLES:
        name = "secure-e8" if title == "untuned" else title.split(",")[0].removesuffix("-guided")
        settings = WRITERS[name]
        start = settings.get("model.adapter")
        begun = {"model.adapter": str(runs / start / "adapter")} if start else {}
        run = finished(runs, name, "smollm2_e2e", {**shared, **settings, **begun})
        texts = runs / "files" / f"{title.split(',')[0]}.jsonl"
        if title == "untuned":
            written(texts, run, made["codes"], rows=KEPT, base=True)
            about = {"epsilon": 0.0, "writer_loss": run.result.final.metrics_before["loss"]}
        else:
            written(texts, run, made["codes"], rows=ROWS, drawn=GUIDED if "guided" in title else DRAWN)
            about = {"epsilon": run.privacy.epsilon, "writer_loss": run.metrics["loss"]}
        more = None
        if title.endswith("most votes"):
            more, texts = voted(runs, f"votes-{texts.stem}", texts, made)
        elif "labels of" in title:
            more, texts = labelled_by(runs, texts, int(title.split()[-1]))
        if more is not None:
            about["epsilon"] += more.privacy.epsilon
        lines[title] = about | scored(runs, texts, judge)
    write_durably(path, json.dumps(lines, indent=1).encode() + b"\n")
    lines = {title: lines[title] for title in TITLES if title in lines}
    heads = ["", "epsilon", "loss of the writer", "texts", "labelled right", "accuracy", "macro-F1"]
    rows = [
        [
            name,
            "unbounded" if one["epsilon"] is None else f"{one['epsilon']:.2f}",
            f"{one['writer_loss']:.3f}",
            f"{one['texts']:,}",
            f"{one['labelled_right']:.0%}",
            f"{one['accuracy']:.4f}",
            f"{one['macro_f1']:.4f}",
        ]
        for name, one in lines.items()
    ]
    readme.put(HERE / "README.md", readme.markdown([heads, *rows]))


if __name__ == "__main__":
    main()
