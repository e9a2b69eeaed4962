"""privacy.unit=user from one end to the other: settings, data, training, ledger, policy, result and report."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.report import from_ledger, from_run
from fedtune.sites import work as site_work
from fedtune.training.users import UserExamples

pytestmark = pytest.mark.nightly

Run = Callable[..., Path]
SMALL = (
    *("runtime.device=cpu", "runtime.num_threads=1", "privacy.noise_multiplier=4.0", "data.train_fraction=0.06"),
    *("data.declared_sizes=9", "data.validation_rows=5", "data.test_rows=5"),
)


def arguments(into: Path, *overrides: str, name: str = "run") -> list[str]:
    return ["experiment=debug_users", f"tracking.output_dir='{into}'", f"name={name}", *SMALL, *overrides]


@pytest.fixture
def run(command: Any, tmp_path: Path) -> Run:
    """A run by user to its end; its folder."""

    def make(*overrides: str, name: str = "run") -> Path:
        outcome = command("simulate", *arguments(tmp_path, *overrides, name=name))
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return make


def test_a_run_by_user_says_so_everywhere(command: Any, tmp_path: Path) -> None:
    outcome = command("simulate", *arguments(tmp_path, "privacy.records_per_user=3"))
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "for each user" in shown
    assert "at most 3 records of a user in a step" in shown
    folder = tmp_path / "run"
    privacy = json.loads((folder / "run.json").read_text())["privacy"]
    assert (privacy["unit"], privacy["records_per_user"]) == ("user", 3)
    assert privacy["epsilon"] > 0

    site = folder / "sites" / "site-1"
    policy = read_policy(site / "site.toml")
    assert (policy.population.unit, policy.limits.max_records_per_user) == ("user", 3)
    history = verify(site / "ledger.db").history
    assert history.opened.unit == "user"
    (known,) = history.runs.values()
    assert (known.plan.unit, known.plan.records_per_user) == ("user", 3)

    for report in (from_run.build(folder), from_ledger.build(site / "site.toml")):
        assert report.unit == "user"
        assert "several_records" not in report.not_protected
        codes = {one.code for one in report.assumptions}
        assert "every_record_names_its_person" in codes
        assert "one_record_is_one_unit" not in codes
        assert {one.records_per_user for one_site in report.sites for one in one_site.mechanisms} == {3}
    page = (folder / "report.html").read_text()
    assert "Everybody with records at a site is protected, for all of their records there together." in page
    assert "Records of a person, at most" in page

    spent = command("ledger", "spent", str(site / "ledger.db"))
    assert "with all records of any one person at a site as without them" in " ".join(spent.out.split())
    assert "Lifetime budget of each user" in spent.out


def test_sites_train_on_whole_users(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, UserExamples] = {}
    train_round = site_work.train_round

    def spy(model: Any, adapter: Any, examples: Any, work: Any, **rest: Any) -> Any:
        seen[work.site] = examples
        return train_round(model, adapter, examples, work, **rest)

    monkeypatch.setattr(site_work, "train_round", spy)
    run("federation.num_rounds=1")
    file = compose_run(arguments(tmp_path)).data.train_file
    with gzip.open(Path(__file__).parents[2] / file, "rt", encoding="utf-8") as lines:
        users = [json.loads(line)["user"] for line in lines]
    sizes = sorted(users.count(user) for user in set(users))
    assert all(isinstance(examples, UserExamples) for examples in seen.values())
    # Whole users: each site's records are those of so many of the file's users, never a part of one's.
    held = [sorted(len(records) for records in examples._users) for examples in seen.values()]
    assert 2 <= sum(map(len, held)) < len(sizes)
    assert all(size >= sizes[0] for site in held for size in site), "ten records at the least, as in the file"


def test_noised_scores_count_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    noised_scores = site_work.noised_scores

    def spy(scores: Any, **rest: Any) -> Any:
        given.append((scores, rest["declared_size"]))
        return noised_scores(scores, **rest)

    monkeypatch.setattr(site_work, "noised_scores", spy)
    overrides = ("privacy.metrics=noised", "data.heldout_fraction=0.4", "federation.num_rounds=1")
    run(*overrides, "data.train_fraction=0.15", "data.declared_sizes=20")
    assert [declared for _, declared in given] == [8.0, 8.0], "held-out users that are declared"
    assert all(0 < len(scores) < 30 for scores, _ in given), "one score a user, of ten records or more each"
    assert all(((scores >= 0) & (scores <= 1)).all() for scores, _ in given)


@pytest.mark.parametrize(("first", "other"), [("user", "record"), ("record", "user")])
def test_a_ledger_of_one_unit_takes_no_run_of_another(command: Any, tmp_path: Path, first: str, other: str) -> None:
    kept = (f"runtime.sites_dir='{tmp_path / 'kept'}'", "federation.num_rounds=1", "training.local_steps=1")

    def simulated(unit: str, name: str) -> Any:
        return command("simulate", *arguments(tmp_path, *kept, f"privacy.unit={unit}", name=name))

    assert simulated(first, "one").code == 0
    refused = simulated(other, "two")
    assert refused.code == 2
    assert f"privacy.unit = '{other}': must be '{first}'" in refused.err
    # Also without the note of how records were dealt out: each site's own policy and ledger refuse.
    (tmp_path / "kept" / "dealt_out.json").unlink()
    refused = simulated(other, "three")
    assert refused.code == 3
    assert f"site-1: unit, asked {other}, allowed {first}" in refused.err


def test_the_planner_speaks_of_users(command: Any, tmp_path: Path) -> None:
    outcome = command("plan", *arguments(tmp_path))
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "for each user, at every site" in shown
    assert "of each user at most 4 records in a step, their mean gradient clipped once; sizes count users" in shown
    assert "the expected number of users, at most, that give away something only they could have caused" in shown
    found = json.loads(command("plan", *arguments(tmp_path), "--json").out)
    assert (found["plan"]["unit"], found["plan"]["records_per_user"]) == ("user", 4)


RUNS = (("one", 4), ("again", 4), ("other", 1))


def test_a_seeded_run_by_user_repeats(run: Run, adapter_of: Any) -> None:
    seeded = ("runtime.seeded_noise=true", "federation.num_rounds=1")
    one, again, other = (run(*seeded, f"privacy.records_per_user={most}", name=name) for name, most in RUNS)
    assert adapter_of(one) == adapter_of(again)
    assert adapter_of(one) != adapter_of(other)
