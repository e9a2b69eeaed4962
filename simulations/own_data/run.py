"""The recipe of experiment=own_data on small problems: few labels, 100 to 750 records a site.

    python simulations/own_data/run.py                              the README's lines, into results.json and its table
    python simulations/own_data/run.py --only bank abstracts-5-100  problems whose keys begin so; other lines are kept
    python simulations/own_data/run.py --recipes auto before         these recipes only
    python simulations/own_data/run.py --epsilons 3 none            these only
    python simulations/own_data/run.py --data FOLDER                in place of simulations/data
    python simulations/own_data/run.py --sst2 FOLDER                with SST-2, whose files are not in the repository

Each problem is cut from a file of simulations/data by a hash of each text.  Problems "for choosing" score on other rows
of the same train file; problems "for confirming" on a test file (speakers: on other rows), and no value was chosen by
them.  Every line runs the command line itself, in this process, with fresh noise.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared_states import shared_frozen_states
from study import hardware

from fedtune.cli.main import main as fedtune
from fedtune.privacy.durable import write_durably

FOLDER = Path(__file__).parent
DATA = FOLDER.parent / "data"
EPSILONS = {"1": 1.0, "3": 3.0, "8": 8.0, "none": None}
BEGIN, END = "<!-- results: written by simulations/own_data/run.py -->", "<!-- end of results -->"
BANK = {
    3: ["card_arrival", "card_delivery_estimate", "lost_or_stolen_card"],
    4: ["card_arrival", "card_linking", "exchange_rate", "top_up_failed"],
    10: [
        *("card_arrival", "card_linking", "exchange_rate", "top_up_failed", "pending_transfer", "transfer_timing"),
        *("declined_transfer", "failed_transfer", "request_refund", "cash_withdrawal_charge"),
    ],
    20: [
        *("card_arrival", "card_linking", "exchange_rate", "top_up_failed", "pending_transfer", "transfer_timing"),
        *("declined_transfer", "failed_transfer", "request_refund", "cash_withdrawal_charge", "change_pin"),
        *("pin_blocked", "passcode_forgotten", "age_limit", "verify_my_identity", "why_verify_identity"),
        *("country_support", "pending_top_up", "top_up_limits", "compromised_card"),
    ],
}
OTHER_BANK = {
    3: ["transfer_into_account", "topping_up_by_card", "receiving_money"],
    5: [
        "edit_personal_details",
        "atm_support",
        "wrong_amount_of_cash_received",
        "card_swallowed",
        "pending_cash_withdrawal",
    ],
    20: [
        *(
            "edit_personal_details",
            "atm_support",
            "wrong_amount_of_cash_received",
            "card_swallowed",
            "extra_charge_on_statement",
        ),
        *(
            "pending_cash_withdrawal",
            "transfer_into_account",
            "topping_up_by_card",
            "receiving_money",
            "exchange_charge",
        ),
        *(
            "terminate_account",
            "getting_spare_card",
            "getting_virtual_card",
            "order_physical_card",
            "visa_or_mastercard",
        ),
        *(
            "fiat_currency_support",
            "card_not_working",
            "cancel_transfer",
            "activate_my_card",
            "direct_debit_payment_not_recognised",
        ),
    ],
}
ABSTRACTS = [
    *("cardiovascular diseases", "digestive system diseases", "general pathological conditions"),
    *("neoplasms", "nervous system diseases"),
]
SPEAKERS = [
    ["DUKE VINCENTIO", "ISABELLA", "MENENIUS", "PETRUCHIO"],
    ["KING EDWARD IV", "LUCIO", "QUEEN ELIZABETH", "SICINIUS"],
]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A small classification.

    Attributes:
        use: "choosing" or "confirming".
        labels: label -> its value in the file.
        size: records a site, which is also what it declares.
        column: of the label; "price" is read out of E2E's meanings.
        max_length: tokens of a text.
        test: another file to score on; null: other rows of `train`.
    """

    key: str
    use: str
    train: Path
    labels: dict[str, Any]
    num_sites: int
    size: int
    test: Path | None = None
    column: str = "label"
    test_rows: int = 600
    max_length: int = 256

    def rows(self, file: Path) -> list[dict[str, str]]:
        """Rows with one of the labels, ordered by a hash of their text."""
        names = {value: label for label, value in self.labels.items()}
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        if self.column == "price":
            found = [{"text": row["ref"], "price": _price(row["mr"])} for row in found]
        by_text = {row["text"]: names[row[self.column]] for row in found if row[self.column] in names}
        order = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())
        return [{"text": text, "label": by_text[text]} for text in order]

    def parts(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """The sites' rows, and those to score."""
        rows = self.rows(self.train)
        needed = self.num_sites * self.size
        scored = (rows[needed:] if self.test is None else self.rows(self.test))[: self.test_rows]
        return rows[:needed], scored

    def write(self, into: Path) -> tuple[Path, Path, list[str]]:
        """Write the sites' file and the scored one; returns them with the labels of the scored rows."""
        training, scored = self.parts()
        assert len(training) == self.num_sites * self.size, f"{self.key}: {len(training)} rows"
        assert len(scored) >= 50, f"{self.key}: {len(scored)} rows to score"
        for name, part in (("train", training), ("test", scored)):
            (into / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return into / "train.jsonl", into / "test.jsonl", [row["label"] for row in scored]


def _price(meaning: str) -> str:
    found = re.search(r"priceRange\[(.*?)\]", meaning)
    return found[1] if found else ""


def _same(labels: Iterable[str]) -> dict[str, Any]:
    return {label: label for label in labels}


def problems(data: Path, sst2: Path | None) -> list[Problem]:
    """All of them, those for choosing first."""
    bank, tables = data / "banking77", data / "e2e_nlg"
    abstracts, plays = data / "medical_abstracts", data / "users_shakespeare"
    train = "train.jsonl.gz"
    made = [
        Problem(
            key=f"bank-{len(labels)}-{size}",
            use="choosing",
            train=bank / train,
            labels=_same(labels),
            num_sites=sites,
            size=size,
        )
        for labels, sites, size in (
            (BANK[3], 2, 100),
            (BANK[4], 3, 100),
            (BANK[10], 3, 100),
            (BANK[10], 3, 300),
            (BANK[20], 3, 100),
            (BANK[20], 4, 400),
        )
    ]
    made += [
        Problem(
            key=f"price-3-{size}",
            use="choosing",
            train=tables / train,
            labels=_same(("high", "moderate", "cheap")),
            column="price",
            num_sites=3,
            size=size,
        )
        for size in (100, 350)
    ]
    made.append(
        Problem(
            key="speakers-4-100",
            use="choosing",
            train=plays / train,
            labels=_same(SPEAKERS[0]),
            column="user",
            num_sites=3,
            size=100,
        )
    )
    sentiment = {"negative": 0, "positive": 1}
    if sst2 is not None:
        made += [
            Problem(key=f"sst2-2-{size}", use="choosing", train=sst2 / train, labels=sentiment, num_sites=3, size=size)
            for size in (100, 250, 750)
        ]
    made += [
        Problem(
            key=f"abstracts-5-{size}",
            use="confirming",
            train=abstracts / train,
            test=abstracts / "test.jsonl.gz",
            labels=_same(ABSTRACTS),
            num_sites=sites,
            size=size,
            max_length=96,
        )
        for sites, size in ((4, 100), (3, 250), (3, 500), (3, 650))
    ]
    made += [
        Problem(
            key=f"otherbank-{len(labels)}-{size}",
            use="confirming",
            train=bank / train,
            test=bank / "test.jsonl.gz",
            labels=_same(labels),
            num_sites=sites,
            size=size,
        )
        for labels, sites, size in ((OTHER_BANK[3], 2, 130), (OTHER_BANK[5], 4, 100), (OTHER_BANK[20], 4, 400))
    ]
    made.append(
        Problem(
            key="otherspeakers-4-100",
            use="confirming",
            train=plays / train,
            labels=_same(SPEAKERS[1]),
            column="user",
            num_sites=3,
            size=100,
        )
    )
    if sst2 is not None:
        made += [
            Problem(
                key=f"sst2-2-{size}-dev",
                use="confirming",
                train=sst2 / train,
                test=sst2 / "dev.jsonl.gz",
                labels=sentiment,
                num_sites=4,
                size=size,
                test_rows=872,
            )
            for size in (150, 500)
        ]
    return made


# An experiment's own values come after its groups, so they are undone one by one.
SGD = ("training=sgd",)

RECIPES: dict[str, list[str]] = {
    "before": [
        *SGD,
        "training.learning_rate=3",
        "training.head_learning_rate=24",
        "training.unclipped_learning_rate=8",
        "training.unclipped_head_learning_rate=14",
    ],
    "third": [
        *(*SGD, "training.learning_rate=1", "training.head_learning_rate=8"),
        *("training.unclipped_learning_rate=2.667", "training.unclipped_head_learning_rate=4.667"),
    ],
    "eighth": [
        *(*SGD, "training.learning_rate=0.375", "training.head_learning_rate=3"),
        *("training.unclipped_learning_rate=1", "training.unclipped_head_learning_rate=1.75"),
    ],
    "fixed": ["training.learning_rate=0.005", "training.head_learning_rate=0.04"],
    "auto": [],
    "one site alone": ["federation.participants=[site-1]"],
}
"""Recipe -> overrides of experiment=own_data."""
LINES = (
    "bank-4-100",
    "price-3-100",
    "abstracts-5-100",
    "otherbank-5-100",
    "otherspeakers",
    "sst2-2-150-dev",
)
"""The problems whose lines the README shows; the others are for `--only` and for stand_in.py."""
COMMON = ["experiment=own_data", "tracking=quiet", "runtime.num_threads=1"]


def run(
    problem: Problem, recipe: list[str], *, epsilon: float | None, folder: Path, files: tuple[Path, Path]
) -> dict[str, Any]:
    """One run by the command line; what it came to, or what refused it."""
    overrides = [
        *COMMON,
        *recipe,
        f"data.train_file='{files[0]}'",
        f"data.test_file='{files[1]}'",
        f"data.labels={json.dumps(list(problem.labels))}",
        f"data.declared_sizes={problem.size}",
        f"data.max_length={problem.max_length}",
        f"federation.num_sites={problem.num_sites}",
        *(["privacy=none", "privacy.sampling_rate=0.3"] if epsilon is None else [f"privacy.epsilon={epsilon}"]),
        f"tracking.output_dir='{folder}'",
        "name=run",
    ]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = fedtune(["simulate", *overrides])
    if code:
        message = " ".join(told.getvalue().split()).replace(str(folder), "RUN")
        kept = sorted((folder / "run" / "checkpoints").glob("round-*.safetensors"))
        return {"failed": message, "rounds": int(kept[-1].stem.removeprefix("round-")) if kept else 0}
    result = json.loads((folder / "run" / "run.json").read_text())
    tensors = {
        name: value
        for file in sorted((folder / "run" / "adapter").glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    return {
        "accuracy": result["final"]["metrics"]["accuracy"],
        "loss": result["final"]["metrics"]["loss"],
        "start": result["final"]["metrics_before"]["accuracy"],
        "rounds": len(result["rounds"]),
        "largest_value": max(float(np.abs(value).max()) for name, value in tensors.items() if ".lora_A." not in name),
        "noise_multiplier": next(iter(result["privacy"]["sites"].values()))["noise_multiplier"],
        "seconds": result["final"]["seconds"],
    }


def lines_of(problem: Problem, *, recipes: list[str], epsilons: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The asked lines of one problem, each with its key."""
    with tempfile.TemporaryDirectory() as scratch, shared_frozen_states():
        *files, scored = problem.write(Path(scratch))
        about = {"use": problem.use, "sites": problem.num_sites, "size": problem.size, "scored": len(scored)}
        about["majority"] = max(Counter(scored).values()) / len(scored)
        for epsilon in epsilons:
            for recipe in recipes:
                print(f"--- {problem.key}, epsilon {epsilon}, {recipe}", flush=True)
                folder = Path(scratch) / f"{recipe}-{epsilon}"
                done = run(
                    problem, RECIPES[recipe], epsilon=EPSILONS[epsilon], folder=folder, files=(files[0], files[1])
                )
                known = {"problem": problem.key, "epsilon": epsilon, "recipe": recipe}
                yield f"{problem.key}/{epsilon}/{recipe}", known | about | done | {"hardware": hardware()}


def table(lines: dict[str, Any]) -> str:
    """The Markdown table: a row for each problem and epsilon, a column for each recipe."""
    recipes = [recipe for recipe in RECIPES if any(line["recipe"] == recipe for line in lines.values())]
    heads = [
        "problem-labels-records",
        "sites",
        "epsilon",
        "majority",
        "start",
        *recipes,
        "largest value, auto",
        "seconds, auto",
    ]
    rows = [heads, ["---", "---:", "---:"] + ["---:"] * (len(heads) - 3)]
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines.values():
        groups.setdefault((line["problem"], line["epsilon"]), {})[line["recipe"]] = line
    for (problem, epsilon), by_recipe in groups.items():
        first = next(iter(by_recipe.values()))
        starts = [line["start"] for line in by_recipe.values() if "start" in line]
        auto = by_recipe.get("auto", {})
        rows.append(
            [
                f"{problem} ({first['use']})",
                str(first["sites"]),
                epsilon,
                f"{first['majority']:.3f}",
                f"{starts[0]:.3f}" if starts else "",
                *(_shown(by_recipe.get(recipe)) for recipe in recipes),
                f"{auto['largest_value']:.2f}" if "largest_value" in auto else "",
                f"{auto['seconds']:.0f}" if "seconds" in auto else "",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shown(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    return f"refused after round {line['rounds']}" if "failed" in line else f"{line['accuracy']:.3f}"


def write(lines: dict[str, Any]) -> None:
    """Write results.json, and the table between the README's marks."""
    write_durably(FOLDER / "results.json", json.dumps({"lines": lines}, indent=1).encode() + b"\n")
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    machines = sorted({line["hardware"] for line in lines.values()})
    body = f"{BEGIN}\n{table(lines)}\n\nMeasured on {'; '.join(machines)}.\n{END}"
    write_durably(readme, (before + body + rest.split(END)[1]).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(LINES))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--epsilons", nargs="*", default=list(EPSILONS), choices=EPSILONS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sst2", type=Path, help="folder with SST-2's train.jsonl.gz and dev.jsonl.gz")
    options = parser.parse_args()
    if options.sst2 is None:
        print("SST-2 is left out: it has no stated licence, so it is not in the repository; name its folder by --sst2.")
    path = FOLDER / "results.json"
    known: dict[str, Any] = json.loads(path.read_text())["lines"] if path.exists() else {}
    for problem in problems(options.data, options.sst2):
        if problem.key.startswith(tuple(options.only)):
            for key, line in lines_of(problem, recipes=options.recipes, epsilons=options.epsilons):
                known[key] = line
                write(known)


if __name__ == "__main__":
    main()
