"""privacy.unit=user from one end to the other: settings, data, training, ledger, policy, result and report."""

import json
from pathlib import Path

import pytest

from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.report import from_ledger, from_run

from ..conftest import command

pytestmark = pytest.mark.nightly

SMALL = (
    *("runtime.device=cpu", "runtime.num_threads=1", "privacy.noise_multiplier=4.0", "data.train_fraction=0.06"),
    *("data.declared_sizes=9", "data.validation_rows=5", "data.test_rows=5"),
)


def arguments(into: Path, *overrides: str, name: str = "run") -> list[str]:
    return ["experiment=debug_users", f"tracking.output_dir='{into}'", f"name={name}", *SMALL, *overrides]


def test_a_run_by_user_says_so_everywhere(tmp_path: Path) -> None:
    shown = " ".join(command("simulate", *arguments(tmp_path, "privacy.records_per_user=3")).printed.split())
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
