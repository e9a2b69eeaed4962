"""The doctor at a provisioned site with each possible fault."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.extras import build_install_command
from fedtune.flower.site_socket import listen_at
from fedtune.model.base_model import hash_model
from fedtune.model.manifest import build_manifest
from fedtune.model.spec import ModelSpec
from fedtune.ops.doctor import examination
from fedtune.ops.doctor.check import DoctorCheck, PrivateLog, Status, build_passed_check, choose_exit_code
from fedtune.ops.doctor.examination import Examination
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.kit_file import Kit, find_model_store_path
from fedtune.ops.kits.members import REQUEST, initialize_site
from fedtune.ops.kits.models import install_model
from fedtune.ops.wire import bounded_http
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Receipt, Refused
from fedtune.privacy.site_policy import Dataset, Policy
from fedtune.spec import LEDGER_SCHEMA, DataError

from ..books import Books
from ..flower.hostile import make_server_context
from ..privacy.builders import change_values
from .conftest import Mailbox, check_snapshot, format_lines, unpack

pytestmark = pytest.mark.usefixtures("remove_proxies")

CANARY = "Xylander-7391"
"""A value in the records, which must not appear in any output."""
CASES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("doctor.yaml").read_text())


@dataclass
class Home(Books):
    """A site's files, the lead's public key, and a run that the lead may request."""

    lead: str
    policy: Policy
    model: Path
    asked: Callable[..., Proposal]

    @property
    def kit(self) -> Path:
        return self.folder / "kit"

    @property
    def records(self) -> Path:
        return self.folder / "records.csv"

    @property
    def site_key(self) -> Path:
        return self.folder / "site_key.pem"

    def change(self, **changes: Any) -> None:
        """Rewrite the policy; dicts change tables."""
        self.policy = change_values(self.policy, **changes)
        write_policy(self.policy, self.site_toml)

    def change_data(self, **changes: Any) -> None:
        self.change(dataset=(dataclasses.replace(self.policy.dataset[0], **changes),))

    def write_records(self, count: int = 100) -> None:
        rows = [f'"{CANARY} came on day {number}",{CANARY if number % 2 else "well"}' for number in range(count)]
        self.records.write_text("\n".join(["letter,outcome", *rows]) + "\n")

    def spend(self, *, rounds: int = 1, **fields: Any) -> None:
        """Charge rounds of a run that the policy allows."""
        proposal = self.asked(lead=self.lead, base_model=self.policy.allow.base_models[0], **fields)
        self.charge(proposal, *range(1, rounds + 1))

    def put_back(self, run: str) -> Receipt:
        """Roll the ledger back to before this run, for which a receipt exists."""
        backup = self.copy_ledger("backup.db")
        self.spend(run=run)
        receipt = self.open().sign_receipt(run)
        os.replace(backup, self.ledger)
        return receipt

    def doubt(self) -> None:
        self.open()
        receipt = self.put_back("r")
        with contextlib.suppress(Refused):
            self.open().require_receipt(receipt)

    def replace_connection_key(self) -> None:
        other_kit = initialize_site(self.site_toml, out=self.folder / "again", new_ledger=True)
        shutil.copy(other_kit / "connection_key.pem", self.kit / "connection_key.pem")

    def damage_model(self) -> None:
        weights = find_model_store_path(self.kit, self.policy.allow.base_models[0]) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")

    def mark(self, name: str) -> None:
        (self.kit / "state").mkdir()
        (self.kit / "state" / name).touch()

    def protect_users(self, records_a_user: int = 1, *, users: int = 100, more: str = "") -> None:
        """Protect the population by user, with this number of records per user."""
        self.change_data(columns={"text": "letter", "label": "outcome", "user": "patient"})
        self.change(population={"unit": "user"})
        rows = [f"came on day {n},well,{CANARY} {user}" for user in range(users) for n in range(records_a_user)]
        self.records.write_text("\n".join(["letter,outcome,patient", *rows]) + f"\n{more}")

    def add_arrival_dates(self, dated: int, date: str = "2026-03") -> None:
        """Give the population arrivals: `dated` of a hundred users have a date in their second record."""
        self.protect_users(2)
        self.change_data(columns={**self.policy.dataset[0].columns, "arrival": "seen"})
        self.change(population={"arrivals": "year"})
        head, *rows = self.records.read_text().splitlines()
        dates = [date if n % 2 and n < 2 * dated else "14.3.2026" for n in range(len(rows))]
        dated_rows = zip(rows, dates, strict=True)
        self.records.write_text("\n".join([f"{head},seen", *(f"{row},{date_text}" for row, date_text in dated_rows)]))

    def examine_site(self, *overrides: str, run: bool = False, model: Path | None = None) -> dict[str, DoctorCheck]:
        """Return the doctor's lines by name; a run is checked if one is given or changed."""
        compose = (lambda policy: self.run(*overrides)) if run or overrides else None
        paths = {"kit_folder": self.kit, "site_toml": self.site_toml, "model": model}
        return {check.name: check for check in Examination(**paths, run=compose, timeout_s=5.0).run_checks()}

    def run(self, *overrides: str) -> RunConfig:
        return compose_run(
            [
                *itertools.chain(*CASES["run"]),
                f"model.path={self.model}",
                f"model.sha256={self.policy.allow.base_models[0]}",
                *overrides,
            ],
            for_real_sites=True,
        )


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.close()


@pytest.fixture
def home(whole_site: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A separate, complete site and a server that answers it."""
    monkeypatch.setattr(bounded_http, "_ALERT_S", 0.02)  # the wait for a refusal, which never comes from this server
    shutil.copytree(whole_site.folder.parent, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(whole_site, folder=tmp_path / "north", model=tmp_path / "tiny")


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: Any, mailbox: Mailbox, site_policy: Any, run_proposal: Any, now: datetime) -> Home:
    tmp_path = tmp_path_factory.mktemp("whole")
    model = tmp_path / "tiny"
    model.mkdir()
    save_file({"w": torch.arange(8.0)}, model / "model.safetensors")
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "LICENSE").write_text("do as you please")
    digest = build_manifest(model).sha256
    federation_toml = tmp_path / "federation.toml"
    federation_toml.write_text(
        f'name = "cardiology"\nserver = "{mailbox.address}"\n'
        f'[[model]]\nname = "tiny"\nsha256 = "{digest}"\nlicense = "CC0-1.0"\n'
    )
    federation = tmp_path / "federation"
    provisioning.init_federation(federation_toml, out=federation, now=now)
    mailbox.context = make_server_context(Kit.read(federation / "server", kind="server").tls())
    lead = Kit.read(federation / "lead", kind="lead").lead
    policy = site_policy("north", allow={"leads": (lead,), "base_models": (digest,)}, releases={"reply_after_s": 600.0})
    site = Home(tmp_path / "north", lead, policy, model, run_proposal)
    site.folder.mkdir()
    columns = {"text": "letter", "label": "outcome"}
    site.change_data(path="records.csv", columns=columns)
    site.write_records()
    request = initialize_site(site.site_toml, out=site.kit) / REQUEST
    admitted = provisioning.check_join_request(federation, request=request, days=None, now=now)[1]()
    unpack(admitted.archive, site.kit)
    install_model(model, Kit.read(site.kit, kind="site"))
    return site


def list_failures(checks: dict[str, DoctorCheck]) -> dict[str, str]:
    """List the failed checks with their findings; each has a fix in one sentence."""
    failures = {name: check.found for name, check in checks.items() if check.status is Status.FAILED}
    for name in failures:
        fix = checks[name].fix
        assert fix, name
        assert fix[0].isupper() or fix.startswith("`"), fix
    return failures


def compute_exit_code(checks: dict[str, DoctorCheck]) -> int:
    return choose_exit_code(checks.values())


def test_doctor_passes_for_a_complete_site(home: Home) -> None:
    home.write_records(count=113)
    checks = home.examine_site(run=True)
    assert list(checks) == [*itertools.chain(*CASES["lines"])]
    assert not list_failures(checks)
    assert compute_exit_code(checks) == 0
    assert [name for name, check in checks.items() if check.status is Status.WARNING] == ["anchor's place"]
    assert checks["base model tiny"].found == "installed and unchanged; license CC0-1.0 (LICENSE)"
    assert checks["ledger"].found.startswith("no ledger yet")
    assert not (home.folder / "ledger.db").exists(), "the doctor must not create files"
    assert not (home.kit / "state").exists()
    assert checks["run"].found.startswith("would be accepted; epsilon 0.")
    assert "lifetime budget 0 % spent before" in checks["run"].found
    texts = json.dumps([check.to_json() for check in checks.values()])
    for secret in (CANARY, "113", "114", "records.csv", "outcome", "well"):
        assert secret not in texts, secret
    assert "enough records for the declared size" in texts
    home.change(approval="manual")
    assert "once a person at this site approves it" in home.examine_site(run=True)["run"].found


def test_doctor_skips_dependent_checks_without_kit_and_policy(tmp_path: Path) -> None:
    visit = Examination(kit_folder=tmp_path / "kit", site_toml=tmp_path / "site.toml")
    checks = {check.name: check for check in visit.run_checks()}
    assert list_failures(checks).keys() == {"policy", "kit"}
    assert compute_exit_code(checks) == 2
    assert checks["encryption (TLS)"].found == "skipped: the kit cannot be used"
    assert checks["disk of the kit"].status is Status.OK
    assert checks["run"].found == "skipped: no experiment was given"


# One fault, and the lines that report it with a remedy: in snapshots/doctor.txt.

OF_THE_MACHINE = {
    *("disk of the kit", "disk of the ledger", "disk of the anchor", "anchor's place", "file system", "memory", "GPU"),
}


def replace_in_file(path: Path, old: str, new: str) -> None:
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


def charge_ledger(change: Callable[[Home], object], *, anchor: str = "anchor.json") -> Callable[[Home], None]:
    """Charge the ledger, and create the anchor if the policy names one."""

    def make(home: Home) -> None:
        home.change(anchor=anchor)
        home.spend()
        change(home)

    return make


SECOND = Dataset(id="letters", declared_size=10, path="gone.csv", columns={"text": "a", "label": "b"})
FAULTS: dict[str, Callable[[Home], Any]] = {
    "a readable private key": lambda home: (home.kit / "connection_key.pem").chmod(0o644),
    "a kit without its key": lambda home: (home.kit / "connection_key.pem").unlink(),
    "a kit for another key": Home.replace_connection_key,
    "a policy with a misspelled key": lambda home: replace_in_file(home.site_toml, "max_rank = 4", "max_rnak = 4"),
    "columns for one of two tasks": lambda home: (
        home.change_data(columns={"text": "letter"}),
        home.change(allow={"tasks": ("classification", "causal_lm")}),
    ),
    "invalid UTF-8": lambda home: home.records.write_bytes(b'letter,outcome\n"Xylander-7391 \xff",well\n'),
    "a blank value": lambda home: home.records.write_bytes(b"letter,outcome\nXylander-7391,\n"),
    "a file without records": lambda home: home.records.write_bytes(b"letter,outcome\n"),
    "a second data set with a missing file": lambda home: home.change(dataset=(*home.policy.dataset, SECOND)),
    "a record with several users": lambda home: home.protect_users(more=f'ours,well,"{CANARY} 1; {CANARY} 2"\n'),
    "users without a date": lambda home: home.add_arrival_dates(0),
    "users mostly without a date": lambda home: home.add_arrival_dates(49),
    "a model with a changed byte": Home.damage_model,
    "a missing model": lambda home: shutil.rmtree(home.kit / "models"),
    "a tampered ledger": charge_ledger(lambda home: replace_in_file(home.ledger, '"rank":4', '"rank":5'), anchor=""),
    "a ledger with another schema": charge_ledger(
        lambda home: home.tamper(f"PRAGMA user_version = {LEDGER_SCHEMA - 1}"), anchor=""
    ),
    "an anchor with another schema": charge_ledger(
        lambda home: replace_in_file(home.folder / "anchor.json", f'"schema": {LEDGER_SCHEMA}', '"schema": 1')
    ),
    "a rolled-back ledger": charge_ledger(lambda home: home.put_back("r2")),
    "a deleted ledger": charge_ledger(lambda home: home.ledger.unlink()),
    "a ledger with a deleted anchor": charge_ledger(lambda home: (home.folder / "anchor.json").unlink()),
    "a ledger for another population": lambda home: (home.open(), home.change(population={"name": "others"})),
    "a frozen ledger": lambda home: home.open().freeze("consent withdrawn"),
    "a ledger in doubt": Home.doubt,
    "a ledger with seeded noise": lambda home: (
        home.change(allow={"seeded_noise": True}),
        home.spend(seeded_noise=True),
    ),
    "a readable site key": lambda home: (home.open(), home.site_key.chmod(0o640)),
    "a deleted site key": lambda home: (home.open(), home.site_key.unlink()),
    "a replaced site key": lambda home: (home.open(), home.site_key.unlink(), SigningKey.load_or_create(home.site_key)),
    "a paused site": lambda home: home.mark("paused"),
    "a departed site": lambda home: home.mark("left"),
}
FAULTS |= {name: partial(Home.change, **changes) for name, changes in CASES["policy_changes"].items()}
FAULTS |= {name: partial(Home.change_data, **changes) for name, changes in CASES["data_changes"].items()}
RUNS: dict[str, list[str]] = CASES["runs"]


@pytest.mark.parametrize("fault", FAULTS | RUNS)
def test_doctor_reports_each_fault_without_showing_records(home: Home, fault: str) -> None:
    """Checks the exit code and the lines with problems; no line contains data of records."""
    model = home.policy.allow.base_models[0]
    FAULTS.get(fault, lambda home: None)(home)
    checks = home.examine_site(*RUNS.get(fault, ()), run=fault in RUNS)
    list_failures(checks)
    texts = json.dumps([check.to_json() for check in checks.values()])
    for secret in (CANARY, "records.csv", "gone.csv", "line 4"):
        assert secret not in texts, texts
    lines, skipped = [f"exit code {compute_exit_code(checks)}"], dict[str, list[str]]()
    for name, check in checks.items():
        if name in OF_THE_MACHINE or check.status is Status.OK:
            continue
        if check.status is Status.SKIPPED:
            skipped.setdefault(check.found, []).append(name)
        else:
            lines += format_lines(check)
    lines += [f"{reason}: {', '.join(names)}" for reason, names in skipped.items()]
    text = "\n".join(lines).replace(str(home.folder), "NORTH").replace(home.lead, "THE LEAD'S")
    short = r"\b[0-9a-f]{16}\.\.\.|\b(?:[0-9a-f]{4} ){4}\.\.\."
    for pattern, mask in {model: "THE MODEL'S", r"\b[0-9a-f]{64}\b": "HEX", short: "HEX..."}.items():
        text = re.sub(pattern, mask, text)
    check_snapshot(fault, text)


def test_doctor_quotes_records_only_in_its_private_log(home: Home) -> None:
    # Its first record becomes the header, which the error would quote as column names.
    home.records.write_text(home.records.read_text().partition("\n")[2])
    home.examine_site()
    log = home.kit / "state" / "doctor.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert CANARY in log.read_text(), "the private log must name the problem"


def test_doctor_names_missing_packages_and_install_commands(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF model and a Parquet file each have a line with the install command for their reader."""
    socket_path = find_model_store_path(home.kit, digest := hashlib.sha256(b"GGUF").hexdigest())
    socket_path.mkdir(parents=True)
    (socket_path / "tiny.gguf").write_bytes(b"GGUF")
    (home.folder / "records.parquet").touch()
    home.change(allow={"base_models": (digest,)})
    home.change_data(path="records.parquet")
    for module in ("gguf", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    failures = list_failures(checks := home.examine_site())
    for name, extra, message in (
        (f"base model {digest[:12]}", "gguf", f"base model = {digest}: requires gguf"),
        ("data", "data", f"{home.folder / 'records.parquet'} requires pyarrow"),
    ):
        assert failures[name] == message
        assert checks[name].fix == f"Run `{build_install_command(extra)}`."
    assert compute_exit_code(checks) == 2


def test_user_level_declared_size_counts_users(home: Home) -> None:
    for change in (lambda: home.protect_users(9), lambda: home.add_arrival_dates(50)):
        change()
        check = home.examine_site()["data patients"]
        assert check.status is Status.OK
        assert check.found == "every record can be read; enough users for the declared size"
    home.change(population={"arrivals": ""})
    home.protect_users(100, users=9)
    check = home.examine_site()["data patients"]
    assert check.status is Status.WARNING
    assert "far fewer users than the declared size" in check.found


def test_doctor_compares_record_counts_in_words_only(home: Home) -> None:
    for count, words in ((40, "far fewer"), (60, "enough records"), (150, "enough records"), (230, "far more")):
        home.write_records(count)
        check = home.examine_site()["data patients"]
        assert words in check.found
        assert check.status is (Status.OK if words == "enough records" else Status.WARNING)
        assert str(count) not in check.found + check.fix


def test_doctor_fails_for_a_file_that_cannot_be_decoded(home: Home) -> None:
    text = home.records.read_text()
    home.records.write_bytes(text.encode("utf-16"))
    checks = home.examine_site(run=True)
    check = checks["data patients"]
    assert (check.status, check.found.split(" (")[0]) == (Status.FAILED, "the file cannot be read")
    assert checks["run's records"].found == "skipped: data patients cannot be read"
    assert "a file in UTF-8" in check.fix


@pytest.mark.parametrize(("label", "rows", "status"), [("well", 0, "OK"), ("ill", 5, "WARNING"), ("ill", 60, "FAILED")])
def test_doctor_checks_that_a_run_can_use_the_records(home: Home, label: str, rows: int, status: str) -> None:
    home.records.write_text("letter,outcome\n" + "a day,well\n" * 100 + f"a day,{label}\n" * rows)
    home.change_data(declared_size=100)
    check = home.examine_site("data.labels=[well,unwell]", "data.declared_sizes=100")["run's records"]
    assert check.status is Status[status]
    assert label not in check.found + check.fix


def test_doctor_skips_run_records_of_an_empty_data_set(home: Home) -> None:
    home.records.write_text("letter,outcome\n")
    assert home.examine_site(run=True)["run's records"].found == "skipped: data patients contains no record"


def test_doctor_warns_of_few_unreadable_rows_and_fails_for_many(home: Home) -> None:
    """A site skips such rows, so a few of them do not stop it."""
    home.write_records(60)
    blank = b"Xylander-7391,\n"
    home.records.write_bytes(home.records.read_bytes() + blank)
    check = home.examine_site()["data patients"]
    assert (check.status, "runs skip such records" in check.found) == (Status.WARNING, True)
    home.records.write_bytes(home.records.read_bytes() + 7 * blank)
    assert home.examine_site()["data patients"].status is Status.FAILED


def test_doctor_reports_too_few_records_without_their_number(home: Home) -> None:
    home.change_data(declared_size=100, min_units=80)
    for count, small in ((79, True), (80, False)):
        home.write_records(count)
        check = home.examine_site()["data patients"]
        assert check.status is (Status.FAILED if small else Status.OK)
        assert ("fewer records than min_units" in check.found) == small
        assert str(count) not in check.found + check.fix


def test_doctor_warns_of_a_certificate_expiring_within_30_days(home: Home, tmp_path: Path, now: datetime) -> None:
    for days, status in ((20, Status.WARNING), (40, Status.OK)):
        admitted = provisioning.renew_site(tmp_path / "federation", "north", days=days, now=now)
        unpack(admitted.archive, home.kit)
        check = home.examine_site()["certificate"]
        assert check.status is status
        assert f"{now + timedelta(days=days):%Y-%m-%d}" in check.found


# The ledger and its budget, base models, and the running process.


def test_doctor_reports_used_and_exhausted_budgets(home: Home) -> None:
    home.change(anchor="anchor.json")
    home.spend(rounds=2)
    checks = home.examine_site(run=True)
    assert not list_failures(checks)
    assert checks["ledger"].found == "complete and signed, and covered by its anchor"
    percent = checks["budget"].found.split(" %")[0]
    assert 0 < int(percent) < 100
    assert f"lifetime budget {percent} % spent before" in checks["run"].found
    history = home.open().history
    spent = history.epsilon(history.count_charges_and_reservations(history.now()))
    home.change(budget={"max_epsilon": spent + 0.01})
    checks = home.examine_site(run=True)
    assert checks["budget"].status is Status.WARNING
    assert "room for 0 runs" in checks["budget"].found
    assert "max_epsilon (" in list_failures(checks)["run"]
    assert compute_exit_code(checks) == 3
    home.change(budget={"max_epsilon": 100.0, "max_epsilon_per_period": spent + 0.01})
    found = home.examine_site()["budget"].found
    assert "room for 0 runs like the policy's reference: max_epsilon_per_period is at most" in found


def test_run_check_reports_the_budget_of_the_admitted_cohorts(home: Home) -> None:
    home.add_arrival_dates(50)
    run = home.asked(lead=home.lead, base_model=home.policy.allow.base_models[0])
    plan = dataclasses.replace(run.plan, unit="user", cohorts=Cohorts(period="year", first=None, last="2025"))
    ledger = home.open()
    ledger.reserve(dataclasses.replace(run, plan=plan), round=1, request="first", arrivals=dict)
    window = "privacy.cohorts={period:year,first:'%s',last:'2026'}"
    other_cohorts, all_cohorts = (
        home.examine_site(
            "privacy.unit=user", "+data.columns.user=patient", "+data.columns.arrival=seen", window % first
        )
        for first in ("2026", "2025")
    )
    percent = other_cohorts["budget"].found.split(" %")[0]
    assert f"lifetime budget {percent} % spent before, {percent} % after" in other_cohorts["run"].found
    assert f"lifetime budget {percent} % spent before, {percent} % after" not in all_cohorts["run"].found


def test_doctor_imports_a_model_once_and_refuses_pickles(home: Home) -> None:
    shutil.rmtree(home.kit / "models")
    checks = home.examine_site(model=home.model)
    assert checks["import"].found.startswith("tiny is installed now")
    assert not list_failures(checks)
    assert "was already installed" in home.examine_site(model=home.model)["import"].found
    (home.model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    checks = home.examine_site(model=home.model)
    assert list_failures(checks) == {"import": f"--import-model = {home.model}: must not contain pytorch_model.bin"}
    assert compute_exit_code(checks) == 2
    assert checks["budget"].status is Status.OK


def test_random_model_needs_no_installed_files(home: Home) -> None:
    digest = hash_model(ModelSpec(path="random:bert"))
    replace_in_file(home.kit / "kit.toml", home.policy.allow.base_models[0], digest)
    home.change(allow={"base_models": (digest,)})
    assert "tiny random model" in home.examine_site()["base model tiny"].found


# Errors in the doctor itself, and the overall result.


@pytest.mark.parametrize("error", [RuntimeError(f"cannot handle {CANARY}"), DataError("records.csv:3", CANARY, "x")])
def test_unexpected_error_text_appears_only_in_the_private_log(
    home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("fedtune.ops.doctor.site_checks._compare_declared_size", Mock(side_effect=error))
    checks = home.examine_site()
    assert list_failures(checks).keys() == {"data"}
    assert CANARY not in str(checks)
    assert CANARY in (home.kit / "state" / "doctor.log").read_text()
    assert checks["budget"].status is Status.OK
    assert compute_exit_code(checks) == 1


def test_doctor_log_is_truncated_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "doctor.log"
    for text in ("first", "second"):
        log = PrivateLog(path)
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o644)
        log.write_entry(text)
        log.write_entry(f"{text} again")
    assert path.read_text() == "second\nsecond again\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_doctor_checks_the_socket_instead_of_a_server_connection(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        examination, "check_control_api", lambda server, timeout_s: build_passed_check("Flower's control", server)
    )
    socket_path = home.site_toml.parent / "s" / "site.sock"
    write_policy(dataclasses.replace(home.policy, socket="s/site.sock"), home.site_toml)
    assert "its folder is missing" in home.examine_site()["socket"].found
    socket_path.parent.mkdir()
    checks = home.examine_site()
    assert not {"connection (TCP)", "clock"} & checks.keys()
    assert "created when the site starts" in checks["socket"].found
    with listen_at(socket_path):
        assert "members of group" in home.examine_site()["socket"].found
        socket_path.chmod(0o666)
        assert home.examine_site()["socket"].status == "failed"
    socket_path.write_text("x")
    assert "a file that is not a socket" in home.examine_site()["socket"].found
