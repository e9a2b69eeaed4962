"""How long a ledger of many years takes to write, open, verify, add up and report.

    python simulations/ledger/run.py          writes results.json

Twenty runs with different settings, 250 rounds each: 10,000 reservations and commits.  Spending is composed from all of
them; a second figure composes 10,000 charges in 20 settings alone, without a file.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fedtune.privacy import accountant, events, filter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import (
    Allow,
    Asserted,
    Budget,
    Dataset,
    Limits,
    Policy,
    Population,
    ReferenceRun,
    Releases,
)
from fedtune.report.derive import profile
from fedtune.report.from_ledger import compute_lifetime_budget

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study

SETTINGS, ROUNDS = 20, 250


def make_plan(number: int) -> Plan:
    """Setting `number` of SETTINGS."""
    return Plan(
        unit="record",
        delta=1e-6,
        sampling_rate=0.01 + 0.002 * number,
        noise_multiplier=4.0 + 0.1 * number,
        max_grad_norm=1.0,
        local_steps=1,
        num_rounds=ROUNDS,
    )


def a_policy(lead: str) -> Policy:
    """One that has room for everything."""
    return Policy(
        site="a",
        population=Population(name="people"),
        dataset=(Dataset(id="d", declared_size=100_000),),
        budget=Budget(
            delta=1e-6,
            max_epsilon=50.0,
            reference=ReferenceRun(sampling_rate=0.03, noise_multiplier=5.0, steps=ROUNDS),
        ),
        limits=Limits(
            min_noise_multiplier=1.0, max_sampling_rate=0.1, max_grad_norm=1.0, max_local_steps=1, max_rounds=ROUNDS
        ),
        allow=Allow(
            leads=(lead,), tasks=("t",), base_models=("b",), target_modules=("q",), max_rank=8, train_head=True
        ),
        releases=Releases(reply_after_s=0.0),
        asserted=Asserted(no_person_at_another_site=True),
    )


def write_ledger(folder: Path) -> tuple[Policy, SigningKey, list[float]]:
    """A ledger of 10,000 reservations and commits; seconds of every hundredth pair."""
    key, lead = SigningKey.load_or_create(folder / "site.pem"), SigningKey.load_or_create(folder / "lead.pem")
    policy, pairs = a_policy(lead.public), []
    ledger = SiteLedger(folder / "ledger.db", policy, key, create=True)
    for number in range(SETTINGS):
        proposal = Proposal(
            run=f"run-{number}",
            lead=lead.public,
            dataset="d",
            task="t",
            base_model="b",
            target_modules=("q",),
            rank=8,
            train_head=True,
            seeded_noise=False,
            num_sites=4,
            dtype="float32",
            lora_scale=2.0,
            head_scale=20.0,
            plan=make_plan(number),
        )
        for round in range(1, ROUNDS + 1):
            began = time.perf_counter()
            granted = ledger.reserve(proposal, round=round, request=f"{number}-{round}")
            assert isinstance(granted, Reservation)
            ledger.commit(granted, b"reply")
            pairs.append(time.perf_counter() - began)
    return policy, key, pairs


def report(ledger: Path) -> None:
    """Write its report as a person does: a process of its own, from the command to the files."""
    subprocess.run(
        [sys.executable, "-m", "fedtune", "report", str(ledger)], capture_output=True, check=True, timeout=120
    )


def seconds(what: Callable[[], object], *, repeats: int = 3) -> float:
    """Median wall time, with nothing cached."""
    taken = []
    for _ in range(repeats):
        for cached in (one for module in (accountant, filter, profile) for one in vars(module).values()):
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        began = time.perf_counter()
        what()
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken), 3)


def compose(runs: Path) -> study.Found:
    """Compose 10,000 charges without a file."""
    charges = [make_plan(number % SETTINGS).event() for number in range(10_000)]
    return {
        "pld_s": seconds(lambda: accountant.epsilon_pld(charges, 1e-6, interval=accountant.COARSE)),
        "rdp_s": seconds(lambda: accountant.epsilon_rdp(charges, 1e-6)),
        "filter_s": seconds(lambda: filter.epsilon_filter(charges, order=8.0, delta=1e-6)),
        "distinct": len(events.count_mechanisms(charges)),
    }


def measure_file(runs: Path) -> study.Found:
    """Write a ledger of 10,000 events, and measure what is done with it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        policy, key, pairs = write_ledger(folder)
        path = folder / "ledger.db"
        ledger, verified = SiteLedger(path, policy, key), verify(path)
        return {
            "events": ledger.history.length,
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "reserve_and_commit_s_first_100": round(statistics.median(pairs[:100]), 4),
            "reserve_and_commit_s_last_100": round(statistics.median(pairs[-100:]), 4),
            "open_s": seconds(lambda: SiteLedger(path, policy, key)),
            "spending_s": seconds(lambda: compute_lifetime_budget(verified)),
            "verify_s": seconds(lambda: verify(path)),
            "report_s": seconds(lambda: report(path), repeats=5),
        }


def main() -> None:
    asked = study.parser(__doc__, Path(__file__).parent).parse_args()
    lines = {"compose_10000_charges_in_20_settings": compose, "ledger_of_10000_events": measure_file}
    study.carry_out(__file__, lines, None, asked=asked)


if __name__ == "__main__":
    main()
