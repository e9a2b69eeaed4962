"""The recipe of experiment=own_data on small problems: few labels, 100 to 750 records a site.

    python simulations/own_data/run.py                         all lines, into results.json and the README's tables
    python simulations/own_data/run.py --only bank-4 abstracts     problems whose keys begin so; other lines are kept
    python simulations/own_data/run.py --recipes now before        these recipes only
    python simulations/own_data/run.py --sst2 FOLDER           with SST-2, whose files are not part of the repository

Each problem is cut from a file of simulations/data by a hash of each text.  Problems "for choosing" score on other rows of
the same train file; problems "for confirming" on a test file (or, for speakers, on other rows), and no value was chosen by
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
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "user_level")]
from shared_states import shared_frozen_states
from study import hardware

from fedtune.cli.main import main as fedtune
from fedtune.privacy.durable import write_durably

FOLDER = Path(__file__).parent
DATA = FOLDER.parent / "data"
EPSILONS = (3, 8, None)
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
    5: ["edit_personal_details", "atm_support", "wrong_amount_of_cash_received", "card_swallowed", "pending_cash_withdrawal"],
    20: [
        *("edit_personal_details", "atm_support", "wrong_amount_of_cash_received", "card_swallowed", "extra_charge_on_statement"),
        *("pending_cash_withdrawal", "transfer_into_account", "topping_up_by_card", "receiving_money", "exchange_charge"),
        *("terminate_account", "getting_spare_card", "getting_virtual_card", "order_physical_card", "visa_or_mastercard"),
        *("fiat_currency_support", "card_not_working", "cancel_transfer", "activate_my_card", "direct_debit_payment_not_recognised"),
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

    def write(self, into: Path) -> tuple[Path, Path, list[str]]:
        """Write the sites' file and the scored one; returns them with the labels of the scored rows."""
        rows = self.rows(self.train)
        needed = self.num_sites * self.size
        scored = (rows[needed:] if self.test is None else self.rows(self.test))[: self.test_rows]
        assert len(rows) >= needed, f"{self.key}: {len(rows)} rows"
        assert len(scored) >= 50, f"{self.key}: {len(scored)} rows to score"
        for name, part in (("train", rows[:needed]), ("test", scored)):
            (into / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return into / "train.jsonl", into / "test.jsonl", [row["label"] for row in scored]


def _price(meaning: str) -> str:
    found = re.search(r"priceRange\[(.*?)\]", meaning)
    return found[1] if found else ""


def _same(labels: Iterable[str]) -> dict[str, Any]:
    return {label: label for label in labels}


def problems(sst2: Path | None) -> list[Problem]:
    """All of them, those for choosing first."""
    bank, tables = DATA / "banking77", DATA / "e2e_nlg"
    abstracts, plays = DATA / "medical_abstracts", DATA / "users_shakespeare"
    train = "train.jsonl.gz"
    made = [
        Problem(key=f"bank-{len(labels)}-{size}", use="choosing", train=bank / train, labels=_same(labels), num_sites=sites, size=size)
        for labels, sites, size in ((BANK[3], 2, 100), (BANK[4], 3, 100), (BANK[10], 3, 100), (BANK[10], 3, 300), (BANK[20], 3, 100), (BANK[20], 4, 400))
    ]
    made += [
        Problem(key=f"price-3-{size}", use="choosing", train=tables / train, labels=_same(("high", "moderate", "cheap")), column="price", num_sites=3, size=size)
        for size in (100, 350)
    ]
    made.append(Problem(key="speakers-4-100", use="choosing", train=plays / train, labels=_same(SPEAKERS[0]), column="user", num_sites=3, size=100))
    sentiment = {"negative": 0, "positive": 1}
    if sst2 is not None:
        made += [
            Problem(key=f"sst2-2-{size}", use="choosing", train=sst2 / train, labels=sentiment, num_sites=3, size=size)
            for size in (100, 250, 750)
        ]
    made += [
        Problem(key=f"abstracts-5-{size}", use="confirming", train=abstracts / train, test=abstracts / "test.jsonl.gz", labels=_same(ABSTRACTS), num_sites=sites, size=size)
        for sites, size in ((4, 100), (3, 250), (3, 500), (3, 650))
    ]
    made += [
        Problem(key=f"otherbank-{len(labels)}-{size}", use="confirming", train=bank / train, test=bank / "test.jsonl.gz", labels=_same(labels), num_sites=sites, size=size)
        for labels, sites, size in ((OTHER_BANK[3], 2, 130), (OTHER_BANK[5], 4, 100), (OTHER_BANK[20], 4, 400))
    ]
    made.append(Problem(key="otherspeakers-4-100", use="confirming", train=plays / train, labels=_same(SPEAKERS[1]), column="user", num_sites=3, size=100))
    if sst2 is not None:
        made += [
            Problem(key=f"sst2-2-{size}-dev", use="confirming", train=sst2 / train, test=sst2 / "dev.jsonl.gz", labels=sentiment, num_sites=4, size=size, test_rows=872)
            for size in (150, 500)
        ]
    return made


RECIPES = {
    "before": ["training=sgd", "training.unclipped_learning_rate=8", "training.unclipped_head_learning_rate=14"],
    "third": [
        *("training=sgd", "training.learning_rate=1", "training.head_learning_rate=8"),
        *("training.unclipped_learning_rate=2.667", "training.unclipped_head_learning_rate=4.667"),
    ],
    "eighth": [
        *("training=sgd", "training.learning_rate=0.375", "training.head_learning_rate=3"),
        *("training.unclipped_learning_rate=1", "training.unclipped_head_learning_rate=1.75"),
    ],
    "now": [],
}
"""Recipe -> overrides of experiment=own_data."""
COMMON = ["experiment=own_data", "tracking=quiet", "runtime.num_threads=1"]


def run(problem: Problem, recipe: list[str], *, epsilon: float | None, folder: Path, files: tuple[Path, Path]) -> dict[str, Any]:
    """One run by the command line; what it came to, or what refused it."""
    overrides = [
        *COMMON,
        *recipe,
        f"data.train_file='{files[0]}'",
        f"data.test_file='{files[1]}'",
        f"data.labels={json.dumps(list(problem.labels))}",
        f"data.declared_sizes={problem.size}",
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
