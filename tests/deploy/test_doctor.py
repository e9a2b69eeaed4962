"""The doctor at a whole site that was really provisioned: each thing that can be wrong is made wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gzip
import http.server
import json
import os
import shutil
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.deploy.doctor import site_checks
from fedtune.deploy.doctor.check import Check, PrivateLog, Status, exit_code_of
from fedtune.deploy.doctor.examination import Visit, examine
from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.kits.members import REQUEST, site_init
from fedtune.deploy.kits.models import install_model, model_place
from fedtune.model.base import model_sha256
from fedtune.model.manifest import manifest_of
from fedtune.model.spec import ModelSpec
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.decisions import Ledger
from fedtune.privacy.policy import Dataset, Policy
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import DataError

CANARY = "Xylander-7391"
"""Stands in the records, and must stand in nothing that is printed."""
ELSEWHERE = Path("/dev/shm")
LINES = [
    *("policy", "kit", "files", "certificate", "site's name", "lead", "time of replies"),
    *("name (DNS)", "connection (TCP)", "encryption (TLS)", "authentication", "clock"),
    *("disk of the kit", "disk of the ledger", "file system", "anchor's place"),
    *("base model tiny", "memory", "GPU", "data patients", "ledger", "site key", "budget", "serving", "run"),
]


@dataclass
class Home:
    """A site's files, and the lead's public key."""

    folder: Path
    lead: str
    policy: Policy
    model: Path

    @property
    def kit(self) -> Path:
        return self.folder / "kit"

    @property
    def site_toml(self) -> Path:
        return self.folder / "site.toml"

    @property
    def records(self) -> Path:
        return self.folder / "records.csv"

    def change(self, **changes: Any) -> None:
        """Write the policy anew; dicts change tables."""
        tables = {
            name: dataclasses.replace(getattr(self.policy, name), **change) if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        self.policy = dataclasses.replace(self.policy, **tables)
        write_policy(self.policy, self.site_toml)

    def change_data(self, **changes: Any) -> None:
        self.change(dataset=(dataclasses.replace(self.policy.dataset[0], **changes),))

    def write_records(self, count: int = 100) -> None:
        rows = [f'"{CANARY} came on day {number}",{CANARY if number % 2 else "well"}' for number in range(count)]
        self.records.write_text("\n".join(["letter,outcome", *rows]) + "\n")

    def open(self) -> Ledger:
        return SiteFiles.of(self.site_toml).open()

    def examined(self, *overrides: str, run: bool = False, model: Path | None = None) -> dict[str, Check]:
        """Every line, by its name; a run is tried out where one is asked for or changed."""
        named = (lambda: self.run(*overrides)) if run or overrides else None
        visit = Visit(kit=self.kit, site_toml=self.site_toml, model=model, run=named, timeout_s=5.0)
        return {check.name: check for check in examine(visit)}

    def run(self, *overrides: str) -> RunConfig:
        """The run that the policy allows."""
        return compose_run(
            [
                *(
                    "name=study",
                    "model=minilm",
                    "data=banking77",
                    "lora=all_linear",
                    f"model.path={self.model}",
                ),
                f"model.sha256={self.policy.allow.base_models[0]}",
                *("data.dataset=patients", "data.labels=[well,ill]", "head.init=zero", "head.label_texts=[]"),
                *("data.partition.kind=iid", "data.declared_sizes=100", "data.max_length=16"),
                *("lora.rank=4", "lora.target_modules=[query,value]"),
                *("federation.num_sites=1", "federation.site_names=[north]", "federation.num_rounds=3"),
                *("federation.spare_rounds=1", "training.local_steps=2"),
                *("privacy.sampling_rate=0.2", "privacy.noise_multiplier=4.0", "privacy.max_grad_norm=1.0"),
                *overrides,
            ]
        )


class Mailbox(http.server.ThreadingHTTPServer):
    """A server of the federation that knows one site."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.context: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        plain, address = super().get_request()
        assert self.context is not None
        return self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"site": "north", "time": time.time()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Mailbox]:
    with Mailbox() as mailbox:
        thread = threading.Thread(target=mailbox.serve_forever, args=(0.01,))
        thread.start()
        yield mailbox
        mailbox.shutdown()
        thread.join()


@pytest.fixture
def home(whole: Home, tmp_path: Path) -> Home:
    """A site of its own that lacks nothing, and a server that answers it."""
    shutil.copytree(whole.folder.parent, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(whole, folder=tmp_path / "north", model=tmp_path / "tiny")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, mailbox: Mailbox, site_policy: Callable[..., Policy], now: datetime
) -> Home:
    """What is copied for each test."""
    tmp_path = tmp_path_factory.mktemp("whole")
    model = tmp_path / "tiny"
    model.mkdir()
    save_file({"w": torch.arange(8.0)}, model / "model.safetensors")
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "LICENSE").write_text("do as you please")
    digest = manifest_of(model).sha256
    written = tmp_path / "federation.toml"
    written.write_text(
        f'name = "cardiology"\nserver = "127.0.0.1:{mailbox.server_port}"\n'
        f'[[model]]\nname = "tiny"\nsha256 = "{digest}"\nlicence = "CC0-1.0"\n'
    )
    federation = tmp_path / "federation"
    provisioning.init(written, out=federation, now=now)
    mailbox.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    mailbox.context.load_cert_chain(federation / "server" / "server.pem", federation / "server" / "server_key.pem")
    mailbox.context.load_verify_locations(federation / "authority" / "ca.pem")
    mailbox.context.verify_mode = ssl.CERT_REQUIRED
    lead = Kit.read(federation / "lead", kind="lead").lead
    policy = site_policy("north", allow={"leads": (lead,), "base_models": (digest,)}, releases={"reply_after_s": 600.0})
    site = Home(tmp_path / "north", lead, policy, model)
    site.folder.mkdir()
    columns = {"text": "letter", "label": "outcome"}
    site.change_data(path="records.csv", columns=columns)
    site.write_records()
    request = site_init(site.site_toml, out=site.kit) / REQUEST
    admitted = provisioning.add_site(federation, request=request, days=None, now=now)
    with zipfile.ZipFile(admitted.archive) as archive:
        archive.extractall(site.kit)
    install_model(model, Kit.read(site.kit, kind="site"))
    return site


def failures(checks: dict[str, Check]) -> dict[str, str]:
    """Names of the checks that failed, with what was found; each says what to do in one sentence."""
    found = {name: check.found for name, check in checks.items() if check.status is Status.FAILED}
    for name in found:
        fix = checks[name].fix
        assert fix, name
        assert fix[0].isupper() or fix.startswith("`"), fix
    return found


def code(checks: dict[str, Check]) -> int:
    return exit_code_of(checks.values())


def test_a_site_that_lacks_nothing(home: Home) -> None:
    checks = home.examined(run=True)
    assert list(checks) == LINES
    assert not failures(checks)
    assert code(checks) == 0
    warned = [name for name, check in checks.items() if check.status is Status.WARNING]
    assert warned == ["anchor's place"]
    assert checks["base model tiny"].found == "installed and unchanged; licence CC0-1.0 (LICENSE)"
    assert checks["ledger"].found.startswith("none yet")
    assert not (home.folder / "ledger.db").exists(), "nothing is made"
    assert not (home.kit / "state").exists()


def test_no_line_tells_of_the_records(home: Home) -> None:
    home.write_records(count=113)
    texts = json.dumps([check.to_json() for check in home.examined(run=True).values()])
    for secret in (CANARY, "113", "114", "records.csv", "outcome", "well"):
        assert secret not in texts, secret
    assert "enough records for the declared size" in texts


def of_users(home: Home, records_a_user: int, *, users: int = 100) -> None:
    """A site whose population is protected by user, with records of so many."""
    columns = {"text": "letter", "label": "outcome", "user": "patient"}
    home.change_data(columns=columns)
    home.change(population={"unit": "user"})
    rows = [f"came on day {n},well,{CANARY} {user}" for user in range(users) for n in range(records_a_user)]
    home.records.write_text("\n".join(["letter,outcome,patient", *rows]) + "\n")


def test_by_user_the_declared_size_is_a_number_of_users(home: Home) -> None:
    of_users(home, 9)
    found = home.examined()["data patients"]
    assert (found.status, found.found) == (
        Status.OK,
        "every record can be read; enough users for the declared size",
    )
    of_users(home, 100, users=9)
    found = home.examined()["data patients"]
    assert found.status is Status.WARNING
    assert "far fewer users than the declared size" in found.found


def test_a_record_of_several_users_is_found_before_a_run_leaves_it_out(home: Home) -> None:
    of_users(home, 1)
    home.records.write_text(home.records.read_text() + f'ours,well,"{CANARY} 1; {CANARY} 2"\n')
    found = home.examined()["data patients"]
    assert found.status is Status.FAILED
    assert found.found.startswith("a record names several users; runs leave such records out")
    assert CANARY not in json.dumps(found.to_json())


def test_replies_that_leave_at_once_are_warned_of(home: Home) -> None:
    assert home.examined()["time of replies"].found == "answers leave at multiples of 600 s after their request"
    home.change(releases={"reply_after_s": 0.0})
    checks = home.examined()
    check = checks["time of replies"]
    assert check.status is Status.WARNING
    assert "the time of a reply tells roughly how many records there are" in check.found
    assert check.fix.startswith("Set `reply_after_s` under [releases] in site.toml")
    assert not failures(checks)


def test_a_run_that_was_not_named_is_skipped(home: Home) -> None:
    assert home.examined()["run"].found == "skipped, because no experiment was named to try out"


# The kit and its certificate.


def test_without_kit_and_policy_everything_else_is_still_looked_at(tmp_path: Path) -> None:
    visit = Visit(kit=tmp_path / "kit", site_toml=tmp_path / "site.toml")
    checks = {check.name: check for check in examine(visit)}
    assert failures(checks).keys() == {"policy", "kit"}
    assert code(checks) == 2
    assert checks["encryption (TLS)"].found == "skipped, because the kit cannot be used"
    assert checks["disk of the kit"].status is Status.OK


def test_a_kit_that_others_can_read(home: Home) -> None:
    (home.kit / "connection_key.pem").chmod(0o644)
    checks = home.examined()
    assert failures(checks).keys() == {"kit"}
    assert checks["kit"].fix == f"Run `chmod 600 {home.kit / 'connection_key.pem'}`."


@pytest.mark.parametrize("name", ["kit.toml", "ca.pem", "site.pem", "connection_key.pem"])
def test_a_kit_that_is_not_whole(home: Home, name: str) -> None:
    (home.kit / name).unlink()
    checks = home.examined()
    assert failures(checks).keys() == {"kit"}
    assert name in checks["kit"].found


def test_a_kit_of_another_key(home: Home, tmp_path: Path) -> None:
    other = site_init(home.site_toml, out=tmp_path / "again")
    shutil.copy(other / "connection_key.pem", home.kit / "connection_key.pem")
    checks = home.examined()
    assert failures(checks).keys() == {"certificate", "encryption (TLS)"}
    assert "made for another" in checks["certificate"].found
    assert code(checks) == 2


def test_a_kit_of_another_site(home: Home) -> None:
    home.change(site="south")
    assert failures(home.examined())["site's name"] == "the kit is for north, the policy for south"


@pytest.mark.parametrize(("days", "status"), [(20, Status.WARNING), (40, Status.OK)])
def test_a_certificate_that_soon_expires(home: Home, tmp_path: Path, now: datetime, days: int, status: Status) -> None:
    renewed(home, tmp_path, days=days, now=now)
    check = home.examined()["certificate"]
    assert check.status is status
    assert f"{now + timedelta(days=days):%Y-%m-%d}" in check.found


def test_a_certificate_that_has_expired(home: Home, tmp_path: Path, now: datetime) -> None:
    renewed(home, tmp_path, days=1, now=now)
    check = doctor_certificate(home, now + timedelta(days=2))
    assert check.status is Status.FAILED
    assert "expired" in check.found
    assert check.fix.startswith("Ask the lead for a new kit")


def test_a_certificate_of_the_future_is_the_clock_s_fault(home: Home, now: datetime) -> None:
    check = doctor_certificate(home, now - timedelta(days=2))
    assert check.status is Status.FAILED
    assert "clock" in check.found


def doctor_certificate(home: Home, now: datetime) -> Check:
    return site_checks.certificate(Kit.read(home.kit, kind="site"), now)


def renewed(home: Home, tmp_path: Path, *, days: int, now: datetime) -> None:
    admitted = provisioning.renew_site(
        tmp_path / "federation", "north", request=None, days=days, new_site_key=False, now=now
    )
    with zipfile.ZipFile(admitted.archive) as archive:
        archive.extractall(home.kit)


# The policy, the lead and the run.


def test_a_policy_that_cannot_be_read(home: Home) -> None:
    home.site_toml.write_text(home.site_toml.read_text().replace("max_rank = 4", "max_rnak = 4"))
    checks = home.examined(run=True)
    assert "max_rnak" in failures(checks)["policy"]
    assert checks["ledger"].found == "skipped, because the policy cannot be used"
    assert checks["authentication"].status is Status.OK, "the connection does not need it"
    home.site_toml.write_text("site = \n")
    assert "must be TOML; there is an error at line" in home.examined()["policy"].found


def test_a_lead_that_the_policy_does_not_know(home: Home, stranger_key: Any) -> None:
    home.change(allow={"leads": (stranger_key.public,)})
    checks = home.examined()
    assert failures(checks).keys() == {"lead"}
    line = checks["lead"].fix.partition("under [allow]: ")[2]
    assert line == f'leads = ["{stranger_key.public}", "{home.lead}"]'
    home.change(allow={"leads": (home.lead,)})
    assert not failures(home.examined())


def test_a_run_that_is_accepted_has_its_price(home: Home) -> None:
    check = home.examined(run=True)["run"]
    assert check.found.startswith("would be accepted; epsilon 0.")
    assert "lifetime budget 0 % taken before" in check.found
    home.change(approval="manual")
    assert "once a person here approves it" in home.examined(run=True)["run"].found


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("lora.rank=8", "max_rank (asked 8, allowed at most 4)"),
        ("data.dataset=others", "dataset (asked others, allowed patients)"),
        ("data.declared_sizes=90", "declared_size (asked 90, allowed 100)"),
        ("federation.num_rounds=9", "max_rounds (asked 10, allowed at most 4)"),
        ("privacy.noise_multiplier=3.0", "min_noise_multiplier (asked 3.0, allowed at least 4)"),
    ],
)
def test_a_run_that_breaks_a_rule(home: Home, override: str, rule: str) -> None:
    checks = home.examined(override)
    assert failures(checks) == {"run": f"would be refused: {rule}"}
    assert code(checks) == 3


def test_a_run_that_is_refused_is_told_what_would_do(home: Home) -> None:
    assert "3 of its 9 rounds" in home.examined("federation.num_rounds=9")["run"].fix
    assert "noise multiplier of 4" in home.examined("privacy.noise_multiplier=3.0")["run"].fix


def test_a_run_without_its_model_s_hash(home: Home) -> None:
    checks = home.examined("model.sha256=null")
    assert "base_models (asked unverified" in failures(checks)["run"]
    assert "model.sha256=HEX" in checks["run"].fix


def test_a_run_that_names_no_such_site(home: Home) -> None:
    check = home.examined("federation.site_names=[south]")["run"]
    assert check.status is Status.WARNING
    assert "names no site north" in check.found


def test_a_run_that_is_misspelt_is_the_settings_fault(home: Home) -> None:
    checks = home.examined("lora.rnak=8")
    assert "lora.rnak" in failures(checks)["run"]
    assert code(checks) == 2


# The ledger and its budget.


def spend(home: Home, proposal: Proposal, *, rounds: int) -> None:
    ledger = home.open()
    for round in range(1, rounds + 1):
        granted = ledger.reserve(proposal, round=round, request=f"{proposal.run} {round}")
        assert not isinstance(granted, bytes)
        ledger.commit(granted, b"reply")


@pytest.fixture
def proposal(home: Home, run_proposal: Callable[..., Proposal]) -> Callable[..., Proposal]:
    """A run that the policy of `home` allows."""
    return lambda **changes: run_proposal(lead=home.lead, base_model=home.policy.allow.base_models[0], **changes)


def test_a_ledger_that_has_lived(home: Home, proposal: Any) -> None:
    home.change(anchor="anchor.json")
    spend(home, proposal(), rounds=2)
    checks = home.examined(run=True)
    assert not failures(checks)
    assert checks["ledger"].found == "whole and signed, as far as its anchor"
    taken = checks["budget"].found.split(" %")[0]
    assert 0 < int(taken) < 100
    assert f"lifetime budget {taken} % taken before" in checks["run"].found


def test_a_budget_that_is_used_up(home: Home, proposal: Any) -> None:
    spend(home, proposal(), rounds=4)
    spent = home.examined()["budget"].found.partition("epsilon ")[2].split(" ")[0]
    home.change(budget={"max_epsilon": float(spent) + 0.01})
    checks = home.examined(run=True)
    assert checks["budget"].status is Status.WARNING
    assert "room for 0 runs" in checks["budget"].found
    assert "max_epsilon (" in failures(checks)["run"]
    assert code(checks) == 3


def test_a_ledger_that_was_changed(home: Home, proposal: Any) -> None:
    spend(home, proposal(), rounds=1)
    data = (home.folder / "ledger.db").read_bytes()
    (home.folder / "ledger.db").write_bytes(data.replace(b'"rank":4', b'"rank":5'))
    checks = home.examined(run=True)
    assert failures(checks).keys() == {"ledger"}
    assert checks["budget"].status is checks["run"].status is Status.SKIPPED
    assert code(checks) == 2


def test_a_ledger_that_is_no_ledger(home: Home) -> None:
    (home.folder / "ledger.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    assert failures(home.examined()).keys() == {"ledger"}


def test_a_ledger_that_was_put_back(home: Home, proposal: Any) -> None:
    home.change(anchor="anchor.json")
    spend(home, proposal(), rounds=1)
    shutil.copy(home.folder / "ledger.db", home.folder / "backup.db")
    spend(home, proposal(run="r2"), rounds=1)
    os.replace(home.folder / "backup.db", home.folder / "ledger.db")
    assert "put back" in failures(home.examined())["ledger"]
    (home.folder / "ledger.db").unlink()
    assert "is missing, and its anchor knows" in failures(home.examined())["ledger"]


def test_a_ledger_whose_anchor_is_gone(home: Home, proposal: Any) -> None:
    home.change(anchor="anchor.json")
    spend(home, proposal(), rounds=1)
    (home.folder / "anchor.json").unlink()
    assert "anchor is missing" in failures(home.examined())["ledger"]


def test_a_ledger_of_another_population(home: Home) -> None:
    home.open()
    home.change(population={"name": "others"})
    assert "was made for population.name = north-patients" in failures(home.examined())["ledger"]


def test_a_ledger_that_is_frozen(home: Home) -> None:
    home.open().freeze("consent withdrawn")
    assert "frozen" in failures(home.examined())["ledger"]


def test_a_ledger_in_doubt(home: Home, proposal: Any) -> None:
    home.open()
    shutil.copy(home.folder / "ledger.db", home.folder / "backup.db")
    spend(home, proposal(), rounds=1)
    receipt = home.open().receipt("r")
    os.replace(home.folder / "backup.db", home.folder / "ledger.db")
    with contextlib.suppress(Exception):
        home.open().require_contains(receipt)
    assert "in doubt" in failures(home.examined())["ledger"]


def test_a_site_key_that_is_wrong(home: Home) -> None:
    home.open()
    key = home.folder / "site_key.pem"
    key.chmod(0o640)
    assert "mode 640" in failures(home.examined())["site key"]
    key.rename(home.folder / "kept.pem")
    assert "is missing" in failures(home.examined())["site key"]
    SigningKey.load_or_make(key)
    assert "not the key that the ledger was made with" in failures(home.examined())["site key"]


def test_a_ledger_with_seeded_noise(home: Home, proposal: Any) -> None:
    home.change(allow={"seeded_noise": True})
    spend(home, proposal(seeded_noise=True), rounds=1)
    check = home.examined()["budget"]
    assert check.status is Status.WARNING
    assert "promises nothing" in check.found


def test_whether_the_site_is_served(home: Home) -> None:
    assert "no process" in home.examined()["serving"].found
    with (home.folder / "ledger.db.serving").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check = home.examined()["serving"]
        assert (check.status, check.found) == (Status.OK, "a process of this site is serving")
    files, state = SiteFiles.of(home.site_toml), home.kit / "state"
    state.mkdir()
    (state / "paused").touch()
    assert "is paused" in site_checks.serving(files, state=state).found
    (state / "left").touch()
    assert "has left" in site_checks.serving(files, state=state).found


# Base models.


def test_a_model_with_a_changed_byte(home: Home) -> None:
    weights = model_place(home.kit, home.policy.allow.base_models[0]) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    checks = home.examined()
    assert "is not what lies in its folder" in failures(checks)["base model tiny"]
    assert "Import it again" in checks["base model tiny"].fix


def test_a_model_that_is_not_installed_and_then_is(home: Home) -> None:
    shutil.rmtree(home.kit / "models")
    checks = home.examined()
    assert "is not installed" in failures(checks)["base model tiny"]
    assert "--import-model" in checks["base model tiny"].fix
    checks = home.examined(model=home.model)
    assert checks["import"].found.startswith("tiny is installed now")
    assert not failures(checks)
    assert "was installed before" in home.examined(model=home.model)["import"].found


def test_an_import_that_is_refused_stops_no_other_check(home: Home) -> None:
    (home.model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    checks = home.examined(model=home.model)
    assert failures(checks) == {"import": f"--import-model = {home.model}: must not hold pytorch_model.bin"}
    assert code(checks) == 2
    assert checks["budget"].status is Status.OK


def test_models_that_kit_and_policy_see_differently(home: Home) -> None:
    here = home.policy.allow.base_models
    home.change(allow={"base_models": ("ab" * 32, "unverified")})
    checks = home.examined()
    assert not failures(checks)
    assert checks["base model abababababab"].status is Status.WARNING
    assert checks["base model unverified"].status is Status.WARNING
    assert "the policy does not allow it" in checks["base model tiny"].found
    home.change(allow={"base_models": ()})
    assert "allows none" in failures(home.examined())["base models"]
    home.change(allow={"base_models": here})


def test_a_made_up_model_needs_no_files(home: Home) -> None:
    digest = model_sha256(ModelSpec(path="random:bert"))
    text = (home.kit / "kit.toml").read_text()
    (home.kit / "kit.toml").write_text(text.replace(home.policy.allow.base_models[0], digest))
    home.change(allow={"base_models": (digest,)})
    assert "made-up model" in home.examined()["base model tiny"].found


# Data.


def data_of(home: Home) -> Check:
    """The data's line, after it and all others were searched for the records."""
    checks = home.examined()
    texts = json.dumps([check.to_json() for check in checks.values()])
    for secret in (CANARY, "records.", "gone.csv", "kept.csv", "line 4"):
        assert secret not in texts.replace("with the records.", ""), texts
    return checks["data patients"]


@pytest.mark.parametrize(
    ("count", "words"), [(40, "far fewer"), (60, "enough records"), (150, "enough records"), (230, "far more")]
)
def test_the_true_count_is_said_in_words_alone(home: Home, count: int, words: str) -> None:
    home.write_records(count)
    check = home.examined()["data patients"]
    assert words in check.found
    assert check.status is (Status.OK if words == "enough records" else Status.WARNING)
    assert str(count) not in check.found + check.fix


def test_a_column_that_is_missing(home: Home) -> None:
    home.change_data(columns={"text": "letter", "label": "department"})
    check = data_of(home)
    assert check.status is Status.FAILED
    assert check.found.startswith("column 'department' is not in every record")


def test_a_file_without_a_header_shows_no_record(home: Home) -> None:
    # Its first record would stand where the error names the columns that there are.
    home.records.write_text(home.records.read_text().partition("\n")[2])
    check = data_of(home)
    assert check.status is Status.FAILED
    log = home.kit / "state" / "doctor.log"
    assert str(log) in check.found
    assert log.stat().st_mode & 0o777 == 0o600
    assert CANARY in log.read_text(), "whoever may read the records can see what is wrong"


def test_columns_of_no_task(home: Home) -> None:
    home.change_data(columns={"prompt": "letter"})
    assert "text, label (classification)" in data_of(home).fix
    home.change_data(columns={"text": "letter", "label": "outcome"})
    home.change(allow={"tasks": ("classification", "causal_lm")})
    assert data_of(home).found.endswith("have not the roles of task causal_lm")


@pytest.mark.parametrize(
    "spoilt",
    [
        b'letter,outcome\n"Xylander-7391 \xff",well\n',
        b'letter,outcome\n"Xylander-7391,well\n',
        b"letter,outcome\nXylander-7391,well,Xylander-7391\n",
        b"letter,outcome\nXylander-7391,\n",
        b"letter,letter,outcome\nXylander-7391,a,b\n",
    ],
)
def test_a_record_that_cannot_be_read(home: Home, spoilt: bytes) -> None:
    home.records.write_bytes(spoilt)
    check = data_of(home)
    assert check.status is Status.FAILED
    assert check.found.startswith("a record cannot be read")


@pytest.mark.parametrize("spoilt", [f'{{"{CANARY}": 1}}', f'["{CANARY}"]', f'{{"letter": "{CANARY}', "nonsense"])
def test_a_line_that_is_no_record(home: Home, spoilt: str) -> None:
    (home.folder / "records.jsonl").write_text(spoilt + "\n")
    home.change_data(path="records.jsonl")
    assert data_of(home).status is Status.FAILED


def test_a_gzip_file_that_was_cut_off(home: Home) -> None:
    # Where it ends is the number of records, but for a few.
    whole = gzip.compress(home.records.read_bytes())
    (home.folder / "records.csv.gz").write_bytes(whole[: len(whole) // 2])
    home.change_data(path="records.csv.gz")
    assert data_of(home).status is Status.FAILED


def test_files_that_are_not_there(home: Home) -> None:
    home.change_data(path="gone.csv")
    assert "is not there" in data_of(home).found
    home.change_data(path=".")
    assert data_of(home).found == "is a folder"
    home.change_data(path="")
    assert data_of(home).found == "has no file"
    (home.folder / "empty.csv").write_text("letter,outcome\n")
    home.change_data(path="empty.csv")
    assert data_of(home).found == "holds no record"


def test_a_file_that_the_system_does_not_give(home: Home) -> None:
    (home.folder / "kept.csv").symlink_to("/proc/self/mem")  # it can be opened; reading it is an error
    home.change_data(path="kept.csv")
    assert data_of(home).status is Status.FAILED


def test_every_data_set_has_its_line(home: Home) -> None:
    second = Dataset(id="letters", declared_size=10, path="gone.csv", columns={"text": "a", "label": "b"})
    home.change(dataset=(*home.policy.dataset, second))
    checks = home.examined()
    assert failures(checks).keys() == {"data letters"}
    assert checks["data patients"].status is Status.OK


# What goes wrong in the doctor itself, and what the lines come to.


@pytest.mark.parametrize("error", [RuntimeError(f"cannot handle {CANARY}"), DataError("records.csv:3", CANARY, "x")])
def test_a_check_that_goes_wrong_shows_no_text(home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedtune.deploy.doctor.site_checks._sized", broken)
    checks = home.examined()
    assert failures(checks).keys() == {"data"}
    assert CANARY not in str(checks)
    assert CANARY in (home.kit / "state" / "doctor.log").read_text()
    assert checks["budget"].status is Status.OK
    assert code(checks) == 1


def test_a_log_that_cannot_be_written_is_not_mentioned(tmp_path: Path) -> None:
    assert PrivateLog(tmp_path / "not" / "there" / "doctor.log").keep("x") == ""


def test_a_log_begins_anew_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "doctor.log"
    for text in ("first", "second"):
        log = PrivateLog(path)
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o644)
        log.keep(text)
        log.keep(f"{text} again")
    assert path.read_text() == "second\nsecond again\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_most_important_failure_is_the_exit_code() -> None:
    def check(exit_code: int, status: Status = Status.FAILED) -> Check:
        return Check(name="", status=status, found="", exit_code=exit_code)

    assert exit_code_of([]) == 0
    assert exit_code_of([check(2, Status.WARNING), check(3, Status.SKIPPED)]) == 0
    assert exit_code_of([check(1)]) == 1
    assert exit_code_of([check(1), check(3)]) == 3
    assert exit_code_of([check(3), check(1), check(2)]) == 2


@pytest.mark.skipif(not ELSEWHERE.is_dir(), reason="needs a second file system")
def test_an_anchor_on_another_disk(home: Home) -> None:
    home.change(anchor=str(ELSEWHERE / "nobody-makes-this" / "anchor.json"))
    checks = home.examined()
    assert checks["anchor's place"].status is Status.OK
    assert "disk of the anchor" in checks
    assert not (ELSEWHERE / "nobody-makes-this").exists()
