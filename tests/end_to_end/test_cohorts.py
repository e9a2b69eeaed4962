"""A simulation over three years whose sites keep their ledgers: new people go on where one budget would have ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import saved_config
from fedtune.privacy.accountant import epsilon_pld
from fedtune.privacy.ledger import register, store
from fedtune.privacy.ledger.verify import verify
from fedtune.report import from_ledger
from fedtune.tasks.saved import SavedAdapter

from ..conftest import command
from .test_user_level import arguments as by_user

pytestmark = pytest.mark.nightly
YEARS = (2024, 2025, 2026)


def arguments(into: Path, name: str, *overrides: str) -> list[str]:
    short = ("data.declared_sizes=30", "data.train_fraction=1.0", "federation.num_rounds=1", "training.local_steps=1")
    files = (f"data.train_file='{into / 'people.jsonl'}'", f"runtime.sites_dir='{into / 'kept'}'")
    return by_user(into, *short, *files, *overrides, name=name)


@pytest.fixture
def simulated(tmp_path: Path) -> Any:
    rows = [
        {"text": f"message {n} of {year}", "user": f"{year}-{n % 20}", "came": f"{year}-0{n % 9 + 1}-01"}
        for year in YEARS
        for n in range(60)
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, cohorts: str | None = None, *more: str, after: str | None = None) -> Any:
        limited = [*([f"privacy.cohorts={cohorts}"] if cohorts else ()), *more]
        begun = arguments(tmp_path, name, "+data.columns.arrival=came")
        return command("simulate", *(("--renew", str(tmp_path / after), f"name={name}") if after else begun), *limited)

    return run


def test_with_cohorts_every_years_people_have_their_own(simulated: Any, tmp_path: Path) -> None:
    for year in YEARS:
        assert simulated(f"of-{year}", f"{{period:year,first:'{year}',last:'{year}'}}").code == 0
    assert "max_epsilon" in simulated("more", "{period:year,first:'2026',last:'2027'}").err
    ledger = tmp_path / "kept" / "site-1" / "ledger.db"
    history = verify(ledger).history
    figures = [history.epsilon(history.charged(year)) for year in YEARS]
    assert history.epsilon() == figures[0] == figures[1] == figures[2] > 0
    assert not history.charged(2027)
    with store.reading(ledger) as file:
        assert {row.cohort for row in register.read_rows(file)} == set(YEARS)
    # One line a cohort, of which the ledger's figure is the largest; the report says the same.
    spent = command("ledger", "spent", str(ledger))
    shown = spent.out
    assert spent.code == 0, spent.err
    assert all(f"came in {year} " in shown for year in YEARS)
    life = json.loads(command("ledger", "spent", str(ledger), "--json").out)
    assert [tuple(one["people"].values()) for one in life["cohorts"]] == [
        *((None, "2023"), ("2024", "2024"), ("2025", "2025"), ("2026", "2026"), ("2027", None))
    ]
    assert life["epsilon"] == pytest.approx(history.epsilon())
    report = from_ledger.build(ledger)
    assert report.sites[0].spent.epsilon == pytest.approx(history.epsilon())
    assert report.sites[0].steps[-1].epsilon == pytest.approx(history.epsilon())
    window = ("+data.columns.arrival=came", "privacy.cohorts={period:year,last:'2026'}")
    plan = command("plan", *arguments(tmp_path, "p", *window))
    assert "it admits and charges people who came up to 2026, and those without a date" in " ".join(plan.out.split())


def test_equal_runs_spend_the_whole_and_people_who_come_go_on(simulated: Any, tmp_path: Path) -> None:
    first = "{period:year,first:'2024',last:'2025'}"
    rule = ("privacy.noise_multiplier=null", "privacy.epsilon=3", "privacy.runs=3")
    for name, before in (("one", None), ("two", "one"), ("three", "two")):
        assert simulated(name, first, *(() if before else rule), after=before).code == 0
    start = json.loads((tmp_path / "three" / "run.json").read_text())["provenance"]["start_adapter"]
    assert start["digest"] == SavedAdapter.read(tmp_path / "two" / "adapter").digest
    ledger, plan = tmp_path / "kept" / "site-1" / "ledger.db", saved_config(tmp_path / "three").plan()
    charged = verify(ledger).history.charged(2024)
    # What was charged, recomputed: all runs together come to epsilon, and one more would pass it.
    assert 2.98 < epsilon_pld(charged, plan.delta) <= 3.0 < epsilon_pld([plan.whole] * 4, plan.delta)
    refused = simulated("four", first, after="three")
    assert (refused.code, "max_epsilon" in refused.err) == (3, True)
    # By itself the window moves on, but has one cohort yet whose budget is spent; the window after that runs.
    assert simulated("moved", after="three").code == 3
    assert simulated("new", "{period:year,first:'2026',last:'2027'}", after="three").code == 0
    history = verify(ledger).history
    assert (history.charged(2024), saved_config(tmp_path / "new").federation.renewal) == (charged, 3)
    assert epsilon_pld(history.charged(2026), plan.delta) == epsilon_pld([plan.whole], plan.delta)
