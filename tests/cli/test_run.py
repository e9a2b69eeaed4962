"""`fedtune run`: settings for real sites, invalid commands, status, stop and resume."""

import fcntl
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.cli.interruptible_run import run_simulation
from fedtune.cli.real_run import start_run
from fedtune.cli.run_settings import compose_for_sites
from fedtune.config import RunConfig, parse, read_saved_config
from fedtune.data.spec import AT_SITE
from fedtune.federation.lead import save_receipts
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import FederationSpec, PublicSpec
from fedtune.ops.deployment import LeadService
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.kit_file import Kit
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.site_policy import Dataset
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.spec import ConfigError
from fedtune.tasks.saved import SavedAdapter, save_task_model
from fedtune.tasks.task_model import build_task_model

from ..conftest import REPOSITORY, make_site_policy, run_command, write_config
from ..ops.conftest import Desk
from . import snapshots

SIZES = {"north": 230, "south": 180, "west": 90}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Kit of a lead with three sites and the revoked site `gone`; west declares only the data set banking77."""
    folder, now = tmp_path_factory.mktemp("federation"), datetime.now(UTC).replace(microsecond=0)
    (folder / "federation.toml").write_text('name = "banks"\nserver = "127.0.0.1:9"\n')
    desk = Desk(provisioning.init_federation(folder / "federation.toml", out=folder / "banks", now=now).folder, now)
    for name, size in {**SIZES, "gone": 50}.items():
        others = [] if name == "west" else [Dataset(id="letters", declared_size=11)]
        desk.add(desk.request(name, dataset=(*others, Dataset(id="banking77", declared_size=size))))
    desk.revoke("gone")
    return Kit.read(desk.folder / "lead", kind="lead")


def run_overrides(*overrides: str) -> list[str]:
    return ["experiment=debug", "name=one", "privacy.noise_multiplier=4.0", *overrides]


@pytest.mark.parametrize(
    "sites", ["[west,north]", "west,north", "['west','north']", '["west", "north"]', "[ west , north ]", "'west',north"]
)
def test_sites_option_accepts_several_list_notations(kit: Kit, sites: str) -> None:
    config = compose_for_sites(run_overrides(f"sites={sites}"), kit=kit)
    assert config.federation.active == ("west", "north")
    assert config.declared_sizes() == {"west": 90, "north": 230}
    assert (config.runtime.kind, config.federation.num_sites) == ("deployment", 2)


def test_run_over_real_sites_needs_no_training_file(kit: Kit, tmp_path: Path) -> None:
    """Uses the experiment file in docs/own_data.md, with these sites' data set."""
    page = (REPOSITORY / "docs" / "own_data.md").read_text(encoding="utf-8").partition("## Your own kind of data")[2]
    text = page.partition("```yaml\n")[2].partition("```")[0]
    assert "triage_notes" in text
    (tmp_path / "triage.yaml").write_text(text.replace("triage_notes", "banking77"))
    words = [f"experiment={tmp_path / 'triage.yaml'}", "name=one", "privacy.noise_multiplier=4.0", "sites=[north,west]"]
    config = compose_for_sites(words, kit=kit)
    assert config.declared_sizes() == {"north": 230, "west": 90}
    assert (config.data.train_file, config.data.test_file, config.data.labels) == (AT_SITE, None, ("urgent", "routine"))
    assert select_settings_for_sites(config).data.train_file == AT_SITE
    assert compose_for_sites([*words[:-1], "sites=[south]"], kit=kit).declared_sizes() == {"south": 180}
    with pytest.raises(ConfigError, match=r"data\.train_file = 'gone\.csv': is set by each site's policy"):
        compose_for_sites([*words, "data.train_file=gone.csv"], kit=kit)


@pytest.mark.parametrize("prefix", ["", "++"])
def test_explicit_declared_sizes_override_the_roster(kit: Kit, prefix: str) -> None:
    for sizes, expected in (("70", {"west": 70, "north": 70}), ("[70,80]", {"west": 70, "north": 80})):
        config = compose_for_sites(run_overrides(f"{prefix}data.declared_sizes={sizes}", "sites=[west,north]"), kit=kit)
        assert config.declared_sizes() == expected
    # A data set that no site declared is accepted here; the sites refuse it.
    undeclared = run_overrides(f"{prefix}data.declared_sizes=70", "data.dataset=undeclared")
    assert compose_for_sites(undeclared, kit=kit).data.dataset == "undeclared"


@snapshots.parametrize_mistakes("mistakes-run")
def test_invalid_run_command_starts_no_run(kit: Kit, typed: str) -> None:
    """Unknown sites, settings of real sites, and a missing kit, folder or name."""
    places = {"KIT": str(kit.folder), "SERVER": str(kit.folder.parent / "server")}
    message = run_command("run", *(places.get(word, word) for word in shlex.split(typed))).failed()
    for name, path in places.items():
        message = message.replace(path, name)
    snapshots.check_message("mistakes-run", typed, message)
    assert not Path("runs").exists()


def test_all_active_sites_take_part_by_default(kit: Kit) -> None:
    overrides = run_overrides("runtime.num_threads=1", "federation.min_sites=2", "federation.num_rounds=1")
    config = compose_for_sites(overrides, kit=kit)
    assert config.declared_sizes() == SIZES
    assert (config.runtime.num_threads, config.federation.min_sites, config.federation.num_rounds) == (1, 2, 1)
    last = compose_for_sites(run_overrides("sites=[west]", "sites=south"), kit=kit)
    assert last.declared_sizes() == {"south": 180}, "the last override wins"
    config = compose_for_sites(run_overrides("data.dataset=letters", "sites=[north,south]"), kit=kit)
    assert config.declared_sizes() == {"north": 11, "south": 11}, "the sizes of this data set"
    # Settings that partition records in a simulation are dropped.
    by_column = ("data.partition.kind=column", "+data.partition.sites.a=0", "+data.columns.site=x")
    for partitioned in (("data.partition.kind=dirichlet", "data.partition.proportions=[1,2]"), by_column):
        partition = compose_for_sites(run_overrides(*partitioned), kit=kit).data.partition
        assert (partition.kind, partition.proportions, partition.sites) == ("iid", (), {})


def test_run_without_a_server_can_be_resumed(kit: Kit, tmp_path: Path) -> None:
    small = ("sites=[north]", "data.validation_rows=2", "data.test_rows=2", f"tracking.output_dir='{tmp_path}'")
    small += ("federation.round_timeout_s=1",)  # the time to wait for the server
    outcome = run_command("run", "--kit", str(kit.folder), *run_overrides(*small))
    assert outcome.code == 1
    assert "127.0.0.1:9 cannot be reached" in outcome.err.splitlines()[-1]
    assert f"Continue with: fedtune run resume {tmp_path / 'one'} --kit {kit.folder}" in outcome.out
    assert read_saved_config(tmp_path / "one").federation.active == ("north",)
    assert not (tmp_path / "one" / "running.json").exists()
    assert "name = 'one': is taken" in run_command("run", "--kit", str(kit.folder), *run_overrides(*small)).failed()
    resumed = run_command("run", "resume", str(tmp_path / "one"), "--kit", str(kit.folder))
    assert (resumed.code, "127.0.0.1:9 cannot be reached" in resumed.err.splitlines()[-1]) == (1, True)
    other = ("training.local_steps=9", "--kit", str(kit.folder))
    message = run_command("run", "resume", str(tmp_path / "one"), *other).failed()
    assert "has a different configuration (training.local_steps was 2, is 9)" in message


@pytest.mark.nightly
def test_sweep_over_real_sites_prints_its_privacy_cost_first(kit: Kit, tmp_path: Path) -> None:
    swept = ["experiment=debug", "name=s", "sites=[north]", "seed=1,2", f"tracking.output_dir='{tmp_path}'"]
    small = ("data.validation_rows=2", "data.test_rows=2", "federation.round_timeout_s=1")
    outcome = run_command("run", "--kit", str(kit.folder), "-m", *swept, *small)
    assert (outcome.code, "127.0.0.1:9 cannot be reached" in outcome.err.splitlines()[-1]) == (1, True)
    first, second, *_ = outcome.out.splitlines()
    assert first == "2 runs of 2 rounds, one after the other: s-seed=1, s-seed=2."
    assert second.startswith("Each spends epsilon 7.998 at delta 1e-05 of its records; together")
    assert f"Continue the sweep with: fedtune run --kit {kit.folder} -m" in " ".join(outcome.out.split())


@pytest.fixture
def folder(tmp_path: Path, kit: Kit) -> Path:
    """Folder of a newly created run over real sites."""
    folder = tmp_path / "one"
    write_config(compose_for_sites(run_overrides(f"tracking.output_dir='{tmp_path}'"), kit=kit), folder)
    return folder


@pytest.fixture
def runner(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a process for the run; it exits on SIGTERM unless `deaf`."""
    started: list[subprocess.Popen[str]] = []

    def start(*, deaf: bool = False) -> subprocess.Popen[str]:
        code = (
            "import fcntl, json, os, signal, sys, time; from pathlib import Path; folder = Path(sys.argv[1])\n"
            f"signal.signal(signal.SIGTERM, signal.SIG_IGN if {deaf} else signal.SIG_DFL)\n"
            "lock = (folder / 'log.txt').open('a'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "(folder / 'running.json').write_text(json.dumps({'pid': os.getpid()}))\n"
            "print('running', flush=True); time.sleep(600)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "running\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_or_resume_skips_site_count_checks_of_a_started_run(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("fedtune.cli.real_run.start_run", lambda words, **_: started.append(words))
    words = run_overrides(f"tracking.output_dir='{tmp_path}'", "data.declared_sizes=[9,8,7]", "federation.min_sites=3")
    assert run_command("run", "--kit", str(kit.folder), "--or-resume", *words).code == 0
    assert started == [tuple(words)]


def test_oversized_settings_are_not_sent_to_sites(kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_saved_config(folder)
    lead = LeadService(kit=kit, federation=config.federation)
    assert parse(json.loads(lead._propose_run(config).settings)) == select_settings_for_sites(config)
    monkeypatch.setattr("fedtune.ops.deployment.MAX_CHARACTERS", 1000)
    with pytest.raises(ConfigError, match=r"settings = '[\d,]+ characters': must have at most 1,000"):
        lead._propose_run(config)


def test_run_stop_ends_only_the_recorded_process(folder: Path, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = ("run", "stop", str(folder))
    assert run_command(*stop).printed == f"{folder} is not running.\n"
    process = runner()
    assert run_command(*stop).printed == f"{folder} is stopped; `fedtune run resume {folder} --kit ...` resumes it.\n"
    assert process.wait(timeout=5) != 0
    monkeypatch.setattr("fedtune.cli.real_run._STOP_S", 0.3)
    process = runner(deaf=True)
    message = run_command(*stop).failed(1)
    assert message.startswith(f"process {process.pid} has not stopped within 0.3 s")
    (folder / "running.json").unlink()
    assert "its process is unknown" in run_command(*stop).failed(1)
    assert process.poll() is None


@pytest.fixture
def ended_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, FederationSpec]]:
    """Record the runs that were ended per site; south does not receive the message."""
    ended: list[tuple[str, FederationSpec]] = []

    def announce(lead: LeadService, run: str, *, timeout_s: float) -> list[str]:
        ended.append((run, lead.federation))
        assert not RunFolder(folder).is_running, "the run is stopped first"
        return [site.site for site in lead.sites if site.site != "south"]

    monkeypatch.setattr(LeadService, "announce_end", announce)
    return ended


SILENT = "Not reached: {}; their budget is released when the run expires."


def test_stop_for_good_prints_the_notified_sites(kit: Kit, folder: Path, runner: Any, ended_runs: list[Any]) -> None:
    runner()
    config, stop = read_saved_config(folder), ("run", "stop", str(folder), "--for-good", "--kit", str(kit.folder))
    stopped, *lines = run_command(*stop).printed.splitlines()
    assert "is stopped" in stopped
    assert lines == ["Sites that were notified of the end of the run: north, west.", SILENT.format("south")]
    names = ("gone", *config.federation.active[1:])
    write_config(replace(config, federation=replace(config.federation, site_names=names)), folder)
    assert run_command(*stop).printed.splitlines()[1:] == [
        "Sites that were notified of the end of the run: west.",
        SILENT.format("gone, south"),
    ]
    assert ended_runs[0] == (select_settings_for_sites(config).run_id(), config.federation)
    assert ended_runs[1][1].active == names[1:]


def test_run_without_its_folder_can_be_ended_with_the_lead_kit(kit: Kit, ended_runs: list[Any], tmp_path: Path) -> None:
    name, stop = f"trial-{'a' * 32}", ("run", "stop", "--for-good", "--kit", str(kit.folder))
    # By the full name in a site's ledger, or by the run's own name if a receipt contains it.
    assert (
        run_command(*stop, name).out
        == f"Sites that were notified of the end of the run: north, west.\n{SILENT.format('south')}\n"
    )
    message = run_command(*stop, "runs/trial").failed()
    assert "must be a run folder, or the full name of a run as in a site's `fedtune ledger show`" in message
    ledger = SiteLedger(
        tmp_path / "ledger.db",
        make_site_policy("north"),
        SigningKey.load_or_create(tmp_path / "key.pem"),
        create=True,
    )
    receipts = kit.folder / "receipts.json"
    save_receipts(receipts, {"north": ledger.sign_receipt(name)})
    try:
        assert run_command(*stop, "runs/trial").code == 0
        assert f"the latest runs are {name}" in run_command(*stop, "runs/other").failed()
    finally:
        receipts.unlink()
    assert [(run, federation.active) for run, federation in ended_runs] == [(name, ("north", "south", "west"))] * 2


def test_run_status_shows_online_sites(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LeadService, "open_grid", lambda self: nullcontext(SimpleNamespace(list_online_nodes=lambda: [1, 3]))
    )
    rows = run_command("run", "status", "--kit", str(kit.folder)).out.splitlines()[-3:]
    assert [row.split() for row in rows] == [["north", "online"], ["south", "no", "response"], ["west", "online"]]
    status = json.loads(run_command("run", "status", "--kit", str(kit.folder), "--json").out)
    assert status["online"] == {"north": True, "south": False, "west": True}
    assert run_command("run", "status").code == 2


def test_resumed_run_keeps_its_sites_and_runs_in_one_process(kit: Kit, folder: Path) -> None:
    message = run_command("run", "resume", str(folder), "sites=[north]", "--kit", str(kit.folder)).failed()
    assert message == "sites = '[north]': cannot be changed when a run is resumed: remove it"
    assert "must be a run folder" in run_command("run", "resume", str(folder / "no"), "--kit", str(kit.folder)).failed()
    with (folder / "log.txt").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = run_command("run", "resume", str(folder), "--kit", str(kit.folder)).failed()
    assert message.endswith("is in use: wait until its run ends, or stop that run")
    assert (folder / "config.yaml").exists()


def test_simulations_and_real_runs_cannot_resume_each_other(kit: Kit, folder: Path, tmp_path: Path) -> None:
    message = run_command("simulate", f"resume={folder}").failed()
    assert (
        message == "runtime = 'deployment': requires real sites: start the run with fedtune run --kit LEAD sites=[...]"
    )
    simulated = tmp_path / "simulated"
    write_config(replace(compose_run(run_overrides("privacy.planned_runs=2")), name="simulated"), simulated)
    message = run_command("run", "resume", str(simulated), "--kit", str(kit.folder)).failed()
    assert "is not a run over real sites: resume it with fedtune simulate resume=" in message
    save_task_model(build_task_model(compose_run(run_overrides()).task_model()), simulated / "adapter")
    with pytest.raises(ConfigError, match="is not a run over real sites: resume it with fedtune simulate renew="):
        compose_for_sites([f"renew='{simulated}'"], kit=kit)


def test_run_status_refuses_a_folder_without_a_run(kit: Kit, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)  # without other runs in the folder, which the message would name
    for action in ("status", "stop"):
        assert (
            run_command("run", action, str(folder)).failed()
            == f"run folder = {str(folder)!r}: must contain a config.yaml"
        )
    for words in (("simulate",), ("run", "--kit", str(kit.folder))):
        message = run_command(*words, "--renew", "it's {gone}").failed()
        assert message == 'run folder = "it\'s {gone}": must contain a config.yaml'


def test_public_stage_runs_only_at_the_lead(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lead trains the public stage before contacting sites, and the run starts from its adapter."""
    public = tmp_path / "public.jsonl"
    public.write_text('{"text": "a", "label": "card_arrival"}\n' * 3)
    overrides = run_overrides("sites=[north,west]", f"public.train_file={public}", f"tracking.output_dir={tmp_path}")
    overrides.append("runtime.sites_dir=kept")
    started: list[RunConfig] = []

    def record_stage(stage: RunConfig, folder: Path, console: Any, *, again: str) -> None:
        started.append(stage)
        assert again == shlex.join(["fedtune", "run", "--kit", str(kit.folder), "--or-resume", *overrides])
        run_simulation(stage, folder, console, again=again)

    monkeypatch.setattr("fedtune.cli.interruptible_run.run_simulation", record_stage)
    monkeypatch.setattr(LeadService, "fit_to_budgets", lambda self, config: config)
    monkeypatch.setattr("fedtune.cli.real_run.show_run", lambda config, *arguments, **others: started.append(config))
    start_run(overrides, kit=kit, metrics=None)
    stage, run = started
    assert (stage.declared_sizes(), stage.runtime.kind, stage.privacy.private) == ({"lead": 3}, "simulation", False)
    assert stage.runtime.sites_dir is None, "the lead's ledger is not in the sites' folder"
    assert (run.declared_sizes(), run.runtime.kind) == ({"north": 230, "west": 90}, "deployment")
    assert run.model.adapter_sha256 == SavedAdapter.read(tmp_path / "one-public" / "adapter").digest
    assert select_settings_for_sites(run).public == PublicSpec(train_file=AT_SITE), "the file stays with the lead"


def test_renewed_run_keeps_its_sites_with_current_sizes(kit: Kit, tmp_path: Path) -> None:
    before = compose_for_sites(
        run_overrides("sites=[north,south]", "data.declared_sizes=[5,6]", "privacy.planned_runs=2"), kit=kit
    )
    write_config(before, tmp_path / "one")
    save_task_model(build_task_model(before.task_model()), tmp_path / "one" / "adapter")
    renew = [f"renew='{tmp_path / 'one'}'", "name=two"]
    renewed = compose_for_sites(renew, kit=kit)
    assert renewed.declared_sizes() == {"north": 230, "south": 180}
    assert (renewed.name, renewed.runtime.kind, renewed.federation.renewal) == ("two", "deployment", 1)
    assert renewed.model.adapter_sha256 == SavedAdapter.read(tmp_path / "one" / "adapter").digest
    assert compose_for_sites([*renew, "sites=[west]"], kit=kit).declared_sizes() == {"west": 90}
