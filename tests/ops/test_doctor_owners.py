"""A file of a site's in the wrong hands has a line of its own, with the command that puts it right."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.ops.doctor import machine_checks, site_checks
from fedtune.ops.doctor.check import Check, Status
from fedtune.ops.doctor.machine_checks import owners
from fedtune.ops.files import name_of
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
STRANGER = 54321


@pytest.fixture
def site(tmp_path: Path, site_policy: Callable[..., Policy]) -> Path:
    """A site's folder as its account made it."""
    policy = site_policy("north", anchor="other disk/anchor.json")
    policy = replace(policy, dataset=(replace(policy.dataset[0], path="records of Miller.csv"),))
    for folder in ("kit/state/runs", "other disk"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("kit/kit.toml", "kit/ca.pem", "kit/site.pem", "kit/connection_key.pem", "kit/state/ledger_id"):
        (tmp_path / name).touch(mode=0o600)
    write_policy(policy, tmp_path / "site.toml")
    SiteFiles.of(tmp_path / "site.toml").open()
    (tmp_path / "ledger.db.serving").touch(mode=0o600)
    (tmp_path / "records of Miller.csv").touch(mode=0o600)
    return tmp_path


def looked_at(site: Path) -> list[Check]:
    return list(owners(site / "kit", site / "site.toml", SiteFiles.of(site / "site.toml")))


def test_a_site_as_it_was_made(site: Path) -> None:
    (check,) = looked_at(site)
    assert check.status is Status.OK
    assert name_of(os.geteuid()) in check.found


WRITTEN = {
    "kit": "kit",
    "state": "kit/state",
    "state/ledger_id": "kit/state/ledger_id",
    "state/runs": "kit/state/runs",
    "ledger": "ledger.db",
    "ledger's lock": "ledger.db.serving",
    "site key": "site_key.pem",
    "anchor": "other disk/anchor.json",
    "anchor's folder": "other disk",
}
KEY = {"connection key": "kit/connection_key.pem"}
"""It says whose the site is."""
READ = {"policy": "site.toml", "kit.toml": "kit/kit.toml", "ca.pem": "kit/ca.pem", "site.pem": "kit/site.pem"}


@pytest.mark.parametrize(("what", "name"), {**WRITTEN, **READ, **KEY}.items())
def test_what_every_account_may_change(site: Path, what: str, name: str) -> None:
    path = site / name
    path.chmod(path.stat().st_mode | 0o022)
    (check,) = looked_at(site)
    assert (check.name, check.status) == (f"files: {what}", Status.FAILED)
    assert str(path) in check.found
    assert "can be changed by every account" in check.found
    # What it says to do is enough.
    subprocess.run(
        check.fix.removeprefix("Run `").removesuffix("`.").replace(str(path), f"'{path}'"), shell=True, check=True
    )
    assert [check.status for check in looked_at(site)] == [Status.OK]


@AS_ROOT
@pytest.mark.parametrize(("what", "name"), {**WRITTEN, **READ}.items())
def test_what_belongs_to_another_account(site: Path, what: str, name: str) -> None:
    os.chown(site / name, STRANGER, STRANGER)
    (check,) = looked_at(site)
    assert (check.name, check.status) == (f"files: {what}", Status.FAILED)
    assert f"belongs to account {STRANGER}, and the site's process runs as root" in check.found
    assert check.fix == f"Run `chown root: {site / name}`."


@AS_ROOT
def test_what_a_foreign_group_may_change(site: Path) -> None:
    os.chown(site / "ledger.db", 0, STRANGER)
    (site / "ledger.db").chmod(0o660)
    (check,) = looked_at(site)
    assert f"can be changed by everyone in group {STRANGER}" in check.found
    assert check.fix == f"Run `chmod g-w {site / 'ledger.db'}`."


def test_records_that_every_account_may_change(site: Path) -> None:
    (site / "records of Miller.csv").chmod(0o666)
    (check,) = looked_at(site)
    assert check.name.startswith("files: data ")
    assert "can be changed by every account" in check.found
    assert "Miller" not in check.found + check.fix, "these lines are shown to others"
    assert "chmod" in check.fix


@AS_ROOT
def test_what_root_made_is_named_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root's commands once left a site: its process could not open its own ledger, and the doctor said: restore."""
    for path in (site, *site.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    for name in ("ledger.db", "other disk/anchor.json"):
        os.chown(site / name, 0, 0)
    monkeypatch.setattr(machine_checks.os, "geteuid", lambda: STRANGER)
    monkeypatch.setattr(site_checks.os, "access", lambda path, mode: Path(path).stat().st_uid == STRANGER)
    assert [(check.name, check.status) for check in looked_at(site)] == [
        ("files: ledger", Status.FAILED),
        ("files: anchor", Status.FAILED),
    ]
    check, history = site_checks.ledger(SiteFiles.of(site / "site.toml"))
    assert history is None
    assert "this account may not read or write" in check.found
    assert "restore" not in check.fix


@AS_ROOT
def test_the_doctor_of_another_account(site: Path) -> None:
    for path in (site, *site.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    (check,) = looked_at(site)
    assert f"the site's process runs as account {STRANGER}, and this is root" in check.found
