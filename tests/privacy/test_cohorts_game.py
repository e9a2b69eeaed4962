"""No person's releases cost more than the figure of their cohort, whatever happens to dates, ledger and backups."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.cohorts import OLDEST, Cohorts
from fedtune.privacy.ledger import register, store
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Refused
from fedtune.privacy.site_policy import Dataset, Policy
from fedtune.spec import RunError

from .builders import make_policy, make_proposal, site_key

YEARS = range(2024, 2029)
PLANS: list[dict[str, Any]] = [{"num_rounds": 2}, {"num_rounds": 3, "noise_multiplier": 0.8, "local_steps": 1}]


class PowerCutError(Exception):
    """The machine stops during a transaction."""


class Site:
    """A site's ledger, the people in its file with their dates, and each person's real loss, also on lost branches."""

    def __init__(self, folder: Path, policy: Policy, chance: random.Random) -> None:
        self.path, self.anchor, self.backup = folder / "ledger.db", folder / "anchor.json", folder / "backup.db"
        self.policy, self.chance = policy, chance
        self.file: dict[str, int] = {}
        self.lost: dict[str, Counter[DpEvent]] = {}
        self.runs: list[tuple[Proposal, int]] = []
        self.ledger = self.open()
        self.done = Counter[str]()
        self.made = 0

    def open(self, *, anchored: bool = True) -> SiteLedger:
        return SiteLedger(self.path, self.policy, site_key, anchor=self.anchor if anchored else None, create=True)

    def move(self) -> None:
        names = ["arrive", "correct", "leave", "run", "run", "run", "next", "crash", "back_up", "back_up", "restore"]
        name = self.chance.choice(names)
        self.done[name] += 1
        getattr(self, name)()
        self.check()

    def date(self) -> int:
        return self.chance.choice([OLDEST, *YEARS])

    def arrive(self) -> None:
        for _ in range(4):
            self.file[f"person {self.chance.randrange(30)}"] = self.date()  # perhaps a known person with another date

    def correct(self) -> None:
        for person in self.chance.sample(sorted(self.file), len(self.file) // 2):
            self.file[person] = self.date()

    def leave(self) -> None:
        if self.file:
            del self.file[self.chance.choice(sorted(self.file))]

    def run(self) -> None:
        first, last = sorted(self.chance.choices(YEARS, k=2))
        cohorts = Cohorts(period="year", first=self.chance.choice([None, str(first)]), last=str(last))
        self.made += 1
        plan = {**self.chance.choice(PLANS), "cohorts": cohorts, "unit": "user", "records_per_user": 4}
        self.runs.append((make_proposal(run=f"run {self.made}", plan=plan), 0))
        self.next()

    def next(self, arrivals: Callable[[], dict[str, int]] | None = None) -> None:
        if not self.runs:
            return
        index = self.chance.randrange(max(0, len(self.runs) - 3), len(self.runs))
        proposal, rounds = self.runs[index]
        self.runs[index] = proposal, rounds + 1
        number = rounds + 1 if rounds < 2 else self.chance.randrange(1, rounds + 1)  # perhaps a retry
        own = arrivals or self.file.copy
        try:
            reservation = self.ledger.reserve(proposal, round=number, request=f"{proposal.run} {number}", arrivals=own)
        except Refused:
            return
        if isinstance(reservation, bytes):
            return
        assert reservation.admitted is not None
        assert reservation.admitted <= self.file.keys()
        for person in reservation.admitted:
            self.lost.setdefault(person, Counter()).update(events.count_mechanisms([proposal.plan.event()]))
        if self.chance.random() < 0.7:
            self.ledger.commit(reservation, b"reply")

    def crash(self) -> None:
        def cut() -> dict[str, int]:
            raise PowerCutError

        before = self.ledger.history.length
        with pytest.MonkeyPatch.context() as patched:
            if self.chance.random() < 0.5:
                patched.setattr(register, "compute_register_digest", lambda *_: cut())
            try:
                self.next(cut)
            except PowerCutError:
                self.done["cut"] += 1
        self.ledger = self.open()
        assert self.ledger.history.length >= before

    def back_up(self) -> None:
        shutil.copy(self.path, self.backup)

    def restore(self) -> None:
        if not self.backup.exists():
            return
        anchor = Head.read(self.anchor)
        shutil.copy(self.backup, self.path)
        if self.chance.random() < 0.5:
            self.ledger = self.open(anchored=False)  # the site trains before the anchor is checked
            for _ in range(7):
                self.chance.choice([self.run, self.run, self.correct, self.arrive])()
        try:
            self.ledger = self.open()
        except RunError:
            self.ledger = self.open(anchored=False)
            self.done["made_up"] += 1
        self.ledger.charge_gap(anchor)
        self.anchor.unlink()
        self.anchor.write_bytes(self.ledger.head().to_bytes())
        self.ledger = self.open()
        self.done["lost_rows"] += bool(self.ledger.history.lost_rows)

    def check(self) -> None:
        with store.open_for_reading(self.path) as file:
            rows = {row.unit: row for row in register.read_rows(file)}
        history, secret = self.ledger.history, site_key.derive_secret("arrivals")
        figures = {OLDEST: history.count_total_charges(OLDEST)}
        for person, lost_cost in self.lost.items():
            cohort = history.find_cohort(rows.get(register.pseudonymize(secret, person)), self.file.get(person, OLDEST))
            if cohort not in figures:
                figures[cohort] = history.count_total_charges(cohort)
            assert lost_cost <= figures[cohort], (person, cohort, self.done)
            assert history.divergence(lost_cost) <= history.divergence(figures[cohort]) * (1 + 1e-12)
            assert history.divergence(lost_cost) <= history.divergence(history.count_total_charges()) * (1 + 1e-12), (
                "total spending must be the largest figure"
            )


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(1000, 11_000), marks=pytest.mark.nightly)])
def test_random_histories_never_exceed_the_charge_of_any_cohort(tmp_path: Path, seeds: range) -> None:
    people = {"unit": "user", "arrivals": "year"}
    site = make_policy(
        population=people, dataset=(Dataset(id="notes", declared_size=2000),), budget={"max_epsilon": 30.0}
    )
    actions = Counter[str]()
    for seed in seeds:
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        game = Site(folder, site, random.Random(seed))
        for _ in range(25):
            game.move()
        verify(game.path, anchor=Head.read(game.anchor))
        actions += game.done
        shutil.rmtree(folder)
    assert min(actions[name] for name in ("cut", "made_up", "lost_rows")) > len(seeds) / 6, actions
