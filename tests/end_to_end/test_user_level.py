"""privacy.unit=user from end to end, over cohorts of people, and in a comparison."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import read_saved_config
from fedtune.privacy.accountant import epsilon_pld
from fedtune.privacy.ledger import register, store
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.report import from_ledger, from_run
from fedtune.tasks.saved import SavedAdapter

from ..conftest import run_command

pytestmark = pytest.mark.nightly

SMALL = (
    *("runtime.device=cpu", "runtime.num_threads=1", "privacy.noise_multiplier=4.0", "data.train_fraction=0.06"),
    *("data.declared_sizes=9", "data.validation_rows=5", "data.test_rows=5"),
)


def list_arguments(into: Path, *overrides: str, name: str = "run") -> list[str]:
    return ["experiment=debug_users", f"tracking.output_dir='{into}'", f"name={name}", *SMALL, *overrides]


def test_user_level_run_states_its_unit_everywhere(tmp_path: Path) -> None:
    output = " ".join(run_command("simulate", *list_arguments(tmp_path, "privacy.records_per_user=3")).printed.split())
    assert "for each user" in output
    assert "at most 3 records of a user in a step" in output
    folder = tmp_path / "run"
    privacy = json.loads((folder / "run.json").read_text())["privacy"]
    assert (privacy["unit"], privacy["records_per_user"]) == ("user", 3)
    assert privacy["epsilon"] > 0

    site = folder / "sites" / "site-1"
    policy = read_policy(site / "site.toml")
    assert (policy.population.unit, policy.limits.max_records_per_user) == ("user", 3)
    history = verify(site / "ledger.db").history
    assert history.opening.unit == "user"
    (run,) = history.runs.values()
    assert (run.plan.unit, run.plan.records_per_user) == ("user", 3)

    for report in (from_run.build_run_report(folder), from_ledger.build_ledger_report(site / "site.toml")):
        assert report.facts.unit == "user"
        assert "several_records" not in report.not_protected
        codes = {item.code for item in report.assumptions}
        assert "every_record_names_its_person" in codes
        assert "one_record_is_one_unit" not in codes
        assert {row.records_per_user for entry in report.sites for row in entry.mechanisms} == {3}
    page = (folder / "report.html").read_text()
    assert "Protected: each person" in page
    assert "Maximum records per person" in page

    spent = run_command("ledger", "spent", str(site / "ledger.db"))
    assert "Whether all records of any one person at a site were used changes the chance" in " ".join(spent.out.split())
    assert "Lifetime budget of each user" in spent.out


# Three years in which the sites keep their ledgers: new people take part after a single budget would be spent.


YEARS = (2024, 2025, 2026)


def simulate_people(into: Path, name: str, *overrides: str) -> list[str]:
    short = ("data.declared_sizes=30", "data.train_fraction=1.0", "federation.num_rounds=1", "training.local_steps=1")
    files = (f"data.train_file='{into / 'people.jsonl'}'", f"runtime.sites_dir='{into / 'kept'}'")
    return list_arguments(into, *short, *files, *overrides, name=name)


@pytest.fixture
def simulated(tmp_path: Path) -> Any:
    rows = [
        {"text": f"message {n} of {year}", "user": f"{year}-{n % 20}", "came": f"{year}-0{n % 9 + 1}-01"}
        for year in YEARS
        for n in range(60)
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, cohorts: str | None = None, *more: str, after: str | None = None) -> Any:
        overrides = [*([f"privacy.cohorts={cohorts}"] if cohorts else ()), *more]
        first = simulate_people(tmp_path, name, "+data.columns.arrival=came")
        return run_command(
            "simulate", *(("--renew", str(tmp_path / after), f"name={name}") if after else first), *overrides
        )

    return run


def test_every_arrival_cohort_has_a_separate_budget(simulated: Any, tmp_path: Path) -> None:
    for year in YEARS:
        assert simulated(f"of-{year}", f"{{period:year,first:'{year}',last:'{year}'}}").code == 0
    assert "max_epsilon" in simulated("more", "{period:year,first:'2026',last:'2027'}").err
    ledger = tmp_path / "kept" / "site-1" / "ledger.db"
    history = verify(ledger).history
    figures = [history.epsilon(history.count_total_charges(year)) for year in YEARS]
    assert history.epsilon() == figures[0] == figures[1] == figures[2] > 0
    assert not history.count_total_charges(2027)
    with store.open_for_reading(ledger) as file:
        assert {row.cohort for row in register.read_rows(file)} == set(YEARS)
    # One line per cohort, and the ledger's figure is the largest of them; the report agrees.
    spent = run_command("ledger", "spent", str(ledger))
    output = spent.out
    assert spent.code == 0, spent.err
    assert all(f"joined in {year} " in output for year in YEARS)
    life = json.loads(run_command("ledger", "spent", str(ledger), "--json").out)
    assert [tuple(cohort["people"].values()) for cohort in life["cohorts"]] == [
        *((None, "2023"), ("2024", "2024"), ("2025", "2025"), ("2026", "2026"), ("2027", None))
    ]
    assert life["epsilon"] == pytest.approx(history.epsilon())
    report = from_ledger.build_ledger_report(ledger)
    assert report.sites[0].spent.epsilon == pytest.approx(history.epsilon())
    assert report.sites[0].steps[-1].epsilon == pytest.approx(history.epsilon())
    window = ("+data.columns.arrival=came", "privacy.cohorts={period:year,last:'2026'}")
    plan = run_command("plan", *simulate_people(tmp_path, "p", *window))
    assert "it admits and charges people who arrived up to 2026, and those without a date" in " ".join(plan.out.split())


def test_renewed_runs_spend_the_whole_budget_and_new_cohorts_continue(simulated: Any, tmp_path: Path) -> None:
    first = "{period:year,first:'2024',last:'2025'}"
    rule = ("privacy.noise_multiplier=null", "privacy.epsilon=3", "privacy.planned_runs=3")
    for name, before in (("one", None), ("two", "one"), ("three", "two")):
        assert simulated(name, first, *(() if before else rule), after=before).code == 0
    start = json.loads((tmp_path / "three" / "run.json").read_text())["provenance"]["start_adapter"]
    assert start["digest"] == SavedAdapter.read(tmp_path / "two" / "adapter").digest
    ledger, plan = tmp_path / "kept" / "site-1" / "ledger.db", read_saved_config(tmp_path / "three").plan()
    charged = verify(ledger).history.count_total_charges(2024)
    # Recomputed charges: all runs together reach epsilon, and one more would exceed it.
    assert 2.98 < epsilon_pld(charged, plan.delta) <= 3.0 < epsilon_pld([plan.full_event] * 4, plan.delta)
    refused = simulated("four", first, after="three")
    assert (refused.code, "max_epsilon" in refused.err) == (3, True)
    # By default the window moves on, but still contains a cohort whose budget is spent; the next window is accepted.
    assert simulated("moved", after="three").code == 3
    assert simulated("new", "{period:year,first:'2026',last:'2027'}", after="three").code == 0
    history = verify(ledger).history
    assert (history.count_total_charges(2024), read_saved_config(tmp_path / "new").federation.renewal) == (charged, 3)
    assert epsilon_pld(history.count_total_charges(2026), plan.delta) == epsilon_pld([plan.full_event], plan.delta)


def test_user_level_comparison_resamples_whole_users(tmp_path: Path) -> None:
    short = ("federation.num_rounds=1", "training.local_steps=1", "tracking=quiet", "data.test_rows=null")
    words = list_arguments(tmp_path, *short, name="chat")
    comparison = json.loads(run_command("compare", *words, "--leave-out", "alone", "--generate", "3", "--json").printed)
    assert comparison["unit"] == "user"
    assert 10 < comparison["units"] < comparison["records"] / 2
    base, federated, pooled = comparison["models"]
    assert set(base["scores"]) == {"loss", "perplexity", "bleu", "rouge_l"}
    assert [model["name"] for model in (federated, pooled)] == ["federated", "pooled"]
    by_record = run_command("compare", federated["folder"], pooled["folder"], "--json")
    assert json.loads(by_record.out)["units"] == comparison["units"], "existing runs must be compared by user, too"
