"""What a lead who signs may try on the report of real sites: `report verify` and the independent program find it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.config import read_saved_config
from fedtune.data.features import FeatureSpec
from fedtune.federation.run_folder import RunFolder
from fedtune.model.adapter import Adapter
from fedtune.model.adapter_files import TENSOR_FILES
from fedtune.model.layers import make_peft_config
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.ops.kits.members import Member, Roster
from fedtune.privacy import accountant, events, keys
from fedtune.privacy.keys import SigningKey
from fedtune.report import checks, from_ledger, from_run, signing
from fedtune.report.checks import Check, TrustedValues, check_report, check_start
from fedtune.report.facts import RunFacts, SiteFacts, StartAdapter
from fedtune.report.model import Report
from fedtune.report.page.render import render
from fedtune.report.verify_report import derive_report, problems
from fedtune.runs.environment import derive_start
from fedtune.spec import KIT_SCHEMA, ConfigError
from fedtune.tasks.registry import TASKS
from fedtune.tasks.saved import SavedAdapter

from ..conftest import REPOSITORY, edit_json, run_command, simulate, write_config
from ..deployment.federation import Federation, list_settings
from ..flower.certificates import Authority
from ..privacy.builders import make_key
from .shown import (
    add_admission,
    add_arrivals,
    add_drift,
    load_report_on_file,
    make_site_key,
    sign_by_sites,
    sign_receipt,
)

SPECIFICATION = importlib.util.spec_from_file_location("verify_report", REPOSITORY / "verifier" / "verify_report.py")
verify_report: Any = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(verify_report)
SITES = ("north", "south", "west")
LEAD, STRANGER = make_key(21), make_key(22)
ROUNDS = 3


def hold(checks: tuple[Check, ...]) -> bool:
    return all(check.state in ("passed", "skipped") for check in checks)


@dataclass
class Deployed:
    """The folder of a finished run of real sites, and the lead's signed report of it."""

    folder: Path
    report: Report
    lead: SigningKey = LEAD

    @property
    def facts(self) -> RunFacts:
        assert isinstance(self.report.facts, RunFacts)
        return self.report.facts

    @property
    def roster(self) -> Path:
        return self.folder.parent / "roster.json"

    def write(self, report: Report) -> None:
        (self.folder / "report.json").write_text(signing.report_to_json(report))

    def checks(self, **trusted: Any) -> tuple[Check, ...]:
        path, report = signing.read_report(str(self.folder))
        return check_report(path, report, TrustedValues(**trusted))

    def holds(self) -> bool:
        """With all that there is to compare it with."""
        keys = {site: make_site_key(site).public for site in SITES}
        return hold(self.checks(key=self.lead.public, site_keys=keys))

    def holds_by_the_other_program(self, *extra: str) -> bool:
        options = extra or ("--key", self.lead.public, "--roster", str(self.roster))
        return verify_report.main([str(self.folder), *options]) == 0


def write_roster(path: Path, lead: SigningKey, **revoked: str) -> None:
    """Write the roster of the three sites, with the times at which some were revoked."""
    members = tuple(
        Member(
            site=site,
            certificate=issue_certificate(site),
            site_key=make_site_key(site).public,
            datasets={"d": 1},
            revoked=revoked.get(site),
        )
        for site in SITES
    )
    roster = Roster(version=KIT_SCHEMA, federation="test", sites=members, number=1)
    path.write_bytes(roster.sign_roster(lead).to_bytes())


@cache
def issue_certificate(site: str) -> str:
    with TemporaryDirectory() as folder:
        return Authority(Path(folder) / "authority").issue(site).certificate.read_text()


def deploy_run(into: Path) -> Deployed:
    """A run of server, lead and sites as processes over TLS, with its lead's report; each site has its name's key."""
    for name in SITES:
        (folder := into / "sites" / name).mkdir(parents=True)
        keys._write_new_key(folder / "site_key.pem", make_site_key(name)._private)
    with contextlib.closing(Federation(into, run_command)) as federation:
        federation.start()
        federation.finish("forged", *list_settings(f"federation.num_rounds={ROUNDS}", "federation.spare_rounds=1"))
    folder, lead = federation.run_folder("forged"), SigningKey.load(federation.lead_kit / "lead_key.pem")
    shutil.copy(federation.lead_kit / "roster.json", folder.parent)
    return Deployed(folder, signing.sign_report(signing.read_report(str(folder))[1], lead), lead)


def simulate_run(into: Path) -> Deployed:
    """A simulation whose sites' receipts, settings and report are those of real sites."""
    rounds = (f"federation.num_rounds={ROUNDS}", "federation.spare_rounds=1", "federation.num_sites=3")
    folder = simulate(*rounds, f"federation.site_names=[{','.join(SITES)}]", into=into)
    record = from_run.read_run(folder)
    config = replace(record.config, runtime=replace(record.config.runtime, kind="deployment"))
    write_config(config, folder)
    record = replace(
        record,
        config=config,
        config_sha256=config.digest(),
        environments=tuple(replace(entry, sampling=None, randomness=None) for entry in record.environments),
    )
    assert record.state is not None
    receipts = {
        site: sign_receipt(receipt, site, run=record.run, simulated=False, reply=record.state.adapter.digest())
        for site, receipt in record.state.receipts.items()
    }
    record = replace(record, state=replace(record.state, receipts=receipts))
    write_roster(into / "roster.json", LEAD)
    return Deployed(
        folder, signing.sign_report(derive_report(from_run.collect_run_facts(folder, record, own={})), LEAD)
    )


@pytest.fixture(scope="module", params=["simulated", pytest.param("deployed", marks=pytest.mark.nightly)])
def run_to_forge(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A run with its report alone, since a page of another report would show any lie."""
    into = tmp_path_factory.mktemp("runs")
    run = deploy_run(into) if request.param == "deployed" else simulate_run(into)
    for name in ("report.html", "adapter/README.md", "adapter/label.svg"):
        (run.folder / name).unlink(missing_ok=True)
    run.write(run.report)
    return run


@pytest.fixture
def run(run_to_forge: Deployed, tmp_path: Path) -> Deployed:
    shutil.copytree(run_to_forge.folder.parent, tmp_path / "runs")
    return replace(run_to_forge, folder=tmp_path / "runs" / run_to_forge.folder.name)


def test_valid_report_passes_both_verifiers(run: Deployed) -> None:
    assert [facts.receipt.charged_rounds for facts in run.facts.sites] == [ROUNDS] * 3
    assert {check.name: check.state for check in run.checks()} == {
        **dict.fromkeys(("schema", "figures", "verdict", "configuration", "files", "signed adapter"), "passed"),
        **dict.fromkeys(("signature", "site keys"), "missing"),
    }
    assert run.holds()
    assert run.holds_by_the_other_program()
    assert not run.holds_by_the_other_program("--key", run.lead.public), "whose keys they are was not compared"


def test_commands_on_the_page_of_a_run_verify_its_report(run: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(run.roster, run.folder)
    (run.folder / "report.html").write_text(html := render(run.report, language="en"))
    monkeypatch.chdir(run.folder)
    commands = re.findall("<code>fedtune (report verify [^<]*)</code>", html)
    assert len(commands) == 2
    for command in commands:
        outcome = run_command(*command.replace("KEY", run.lead.public).split())
        assert outcome.code == 0, outcome.printed


def change_sites(facts: RunFacts, change: Callable[[SiteFacts], SiteFacts], *names: str) -> RunFacts:
    """The facts with some sites changed; without names, all."""
    return replace(facts, sites=tuple(change(item) if item.site in (names or SITES) else item for item in facts.sites))


def resign_receipts(facts: RunFacts, *names: str, key: str = "", **changes: Any) -> RunFacts:
    """The facts with receipts that the sites signed so, or the holder of another key."""
    return change_sites(
        facts, lambda entry: replace(entry, receipt=sign_receipt(entry.receipt, key or entry.site, **changes)), *names
    )


def edit_receipts(facts: RunFacts, *names: str, **changes: Any) -> RunFacts:
    """The facts with receipts that were changed after they were signed."""
    return change_sites(facts, lambda entry: replace(entry, receipt=replace(entry.receipt, **changes)), *names)


def remove_receipts(facts: RunFacts, *names: str) -> RunFacts:
    return change_sites(facts, lambda entry: replace(entry, receipt=None), *names)


def drop_rounds(facts: RunFacts, rounds: int, **changes: Any) -> RunFacts:
    return replace(facts, rounds=facts.rounds[:rounds], **changes)


def change_plan(facts: RunFacts, **changes: Any) -> RunFacts:
    return replace(facts, plan=replace(facts.plan, **changes))


def forge_keys(facts: RunFacts, **changes: Any) -> RunFacts:
    """With keys of the lead's own, which signed whatever it takes."""
    return resign_receipts(facts, key="made up", run=facts.run, plan=facts.plan.digest(), **changes)


def change_settings(facts: RunFacts, change: Callable[[dict[str, Any]], object]) -> RunFacts:
    """With other settings, of which the run's name has the digest."""
    sent = json.loads(facts.sent)
    change(sent)
    text = json.dumps(sent, sort_keys=True)
    return replace(facts, sent=text, run=f"{facts.name}-{verify_report.hashlib.sha256(text.encode()).hexdigest()[:32]}")


def exclude_updates(facts: RunFacts, site: str, reason: str) -> RunFacts:
    """A site whose updates of all rounds but the first are called something else."""
    first, *rest = facts.rounds
    said = [replace(one, sites=tuple(s for s in one.sites if s != site), failed_sites={site: reason}) for one in rest]
    return replace(facts, rounds=(first, *said))


def remove_site(facts: RunFacts, site: str) -> RunFacts:
    rounds = tuple(replace(entry, sites=tuple(s for s in entry.sites if s != site)) for entry in facts.rounds)
    return replace(facts, rounds=rounds, sites=tuple(entry for entry in facts.sites if entry.site != site))


def change_model(facts: RunFacts, sha256: str) -> RunFacts:
    return replace(facts, provenance=replace(facts.provenance, model_sha256=sha256))


def swap_receipts(facts: RunFacts) -> RunFacts:
    first, second, *rest = facts.sites
    pair = replace(first, receipt=second.receipt), replace(second, receipt=first.receipt)
    return replace(facts, sites=(*pair, *rest))


def simulate_receipts(facts: RunFacts) -> RunFacts:
    """A simulation's receipts, which its one process can sign."""
    return resign_receipts(facts, simulated=True)


def begin_in_adapter(facts: RunFacts, signers: Sequence[str] | None = None, **changes: Any) -> RunFacts:
    """A run that began in an adapter, as its sites were asked and signed; the report changes what it says of that."""
    privacy = {"epsilon": 2.0, "delta": 1e-5, "unit": "record"}
    signed = {f"start_{key}": value for key, value in privacy.items()} | {"start_keys": signers}
    facts = change_settings(
        facts, lambda sent: (sent["model"].update(adapter_sha256=OTHER), sent["privacy"].update(signed))
    )
    start = StartAdapter(**{"digest": OTHER, "run": None, "dataset": None, **privacy, **changes})
    return resign_receipts(replace(facts, provenance=replace(facts.provenance, start_adapter=start)), run=facts.run)


OTHER = "56" * 32
LIES: dict[str, Callable[[RunFacts], RunFacts]] = {
    # Fewer rounds.
    "a receipt edited": lambda facts: edit_receipts(facts, charged_rounds=1),
    "one receipt edited": lambda facts: edit_receipts(facts, "south", charged_rounds=1),
    "an older receipt called the last": lambda facts: edit_receipts(
        resign_receipts(facts, charged_rounds=1, ended=False), ended=True
    ),
    "an older receipt, others left out": lambda facts: exclude_updates(
        resign_receipts(facts, "south", charged_rounds=1, ended=False), "south", "left_out"
    ),
    "an older receipt, others refused": lambda facts: exclude_updates(
        resign_receipts(facts, "south", charged_rounds=0, ended=False, plan=""), "south", "max_epsilon"
    ),
    "an older report beside the newer model": lambda facts: drop_rounds(
        resign_receipts(facts, charged_rounds=1, ended=False), 1, final={}, detail=None
    ),
    "an older report without the model": lambda facts: drop_rounds(
        resign_receipts(facts, charged_rounds=1, ended=False), 1, final={}, detail=None, files={}
    ),
    "fewer rounds with the last receipts": lambda facts: drop_rounds(facts, 1, final={}, detail=None, files={}),
    "fewer rounds planned": lambda facts: change_plan(drop_rounds(facts, 1), num_rounds=1),
    "no spare rounds": lambda facts: change_plan(facts, spare_rounds=0),
    # Receipts of others.
    "a receipt dropped": lambda facts: remove_receipts(facts, "south"),
    "all receipts dropped": remove_receipts,
    "a receipt of another run": lambda facts: resign_receipts(facts, "south", run=f"{facts.name}-{'0' * 32}"),
    "receipts swapped between sites": swap_receipts,
    "a site's receipt for all": lambda facts: change_sites(
        facts, lambda one: replace(one, receipt=facts.sites[0].receipt)
    ),
    "keys of the lead's own": lambda facts: forge_keys(facts, charged_rounds=1),
    "keys of the lead's own for one site": lambda facts: resign_receipts(
        facts, "south", key="made up", charged_rounds=3
    ),
    "keys of the lead's own, same rounds": forge_keys,
    # Another plan.
    "more noise": lambda facts: change_plan(facts, noise_multiplier=8.0),
    "more noise, receipts dropped": lambda facts: change_plan(remove_receipts(facts), noise_multiplier=8.0),
    "more noise, keys of the lead's own": lambda facts: forge_keys(change_plan(facts, noise_multiplier=8.0)),
    "a lower sampling rate": lambda facts: change_plan(facts, sampling_rate=0.01),
    "a larger delta": lambda facts: change_plan(facts, delta=1e-3),
    "fewer steps": lambda facts: change_plan(facts, local_steps=1),
    "a higher target": lambda facts: replace(facts, target_epsilon=80.0),
    "no target": lambda facts: replace(facts, target_epsilon=None),
    # Another run.
    "a site dropped": lambda facts: remove_site(facts, "west"),
    "a site dropped from the settings, too": lambda facts: remove_site(
        change_settings(facts, lambda sent: sent["federation"].update(site_names=["north", "south"])), "west"
    ),
    "a declared size changed": lambda facts: change_sites(facts, lambda one: replace(one, declared_size=9)),
    "another base model": lambda facts: change_model(facts, OTHER),
    "another base model in the settings, too": lambda facts: change_model(
        change_settings(facts, lambda sent: sent["model"].update(sha256=OTHER)), OTHER
    ),
    "a private start called public": lambda facts: begin_in_adapter(facts, public=True),
    "a start with another epsilon": lambda facts: begin_in_adapter(facts, epsilon=0.1),
    "a start with another delta": lambda facts: begin_in_adapter(facts, delta=1e-300),
    "a start with another unit": lambda facts: begin_in_adapter(facts, unit="user"),
    "another start": lambda facts: begin_in_adapter(facts, digest="78" * 32),
    "another data set": lambda facts: replace(facts, provenance=replace(facts.provenance, dataset="public")),
    "another run's name": lambda facts: replace(facts, run=f"{facts.name}-{'1' * 32}"),
    "a simulation as real": simulate_receipts,
    "a simulation as real, keys of the lead's own": lambda facts: forge_keys(facts, simulated=False),
    "real sites as a simulation": lambda facts: replace(
        facts, settings={**facts.settings, "runtime": "simulation"}, sent=""
    ),
    "a seed hidden": lambda facts: resign_receipts(facts, seeded_noise=True),
    "a seed hidden in a receipt edited": lambda facts: edit_receipts(
        resign_receipts(facts, seeded_noise=True), seeded_noise=False
    ),
    "another adapter named": lambda facts: replace(facts, files=dict.fromkeys(facts.files, OTHER)),
    "no adapter named": lambda facts: replace(facts, files={}),
    "a receipt of another adapter": lambda facts: resign_receipts(facts, "south", reply=OTHER),
    "receipts of another adapter": lambda facts: resign_receipts(facts, reply=OTHER),
    "a receipt without the adapter": lambda facts: resign_receipts(facts, "south", reply=""),
    "receipts without the adapter": lambda facts: resign_receipts(facts, reply=""),
}
"""What a lead may change in the facts, before all else is derived from them and signed."""


@pytest.mark.parametrize("forgery", LIES)
def test_forgeries_signed_by_the_lead_are_rejected(run: Deployed, forgery: str) -> None:
    run.write(signing.sign_report(derive_report(LIES[forgery](run.facts)), run.lead))
    assert not run.holds()
    assert not run.holds_by_the_other_program()


CRAFTED = {
    "a list": lambda sent: [],
    "a number": lambda sent: 1,
    "no object as a group": lambda sent: {"data": None, "federation": 1},
    "a text as privacy": lambda sent: sent | {"privacy": "none"},
    "a number of sites": lambda sent: sent | {"federation": sent["federation"] | {"site_names": 2}},
    "unhashable sites": lambda sent: sent | {"federation": sent["federation"] | {"site_names": [["north"], ["south"]]}},
    "a number of participants": lambda sent: sent | {"federation": sent["federation"] | {"participants": 1}},
    "unhashable keys": lambda sent: sent | {"privacy": sent["privacy"] | {"start_keys": [["north"]]}},
}
"""Settings of another form, by what is wrong with them."""


@pytest.mark.parametrize("defect", CRAFTED)
def test_malformed_sent_settings_are_rejected_with_a_reason(run: Deployed, defect: str) -> None:
    facts = begin_in_adapter(run.facts)
    text = json.dumps(CRAFTED[defect](json.loads(facts.sent)))
    name = f"{facts.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    facts = resign_receipts(replace(facts, sent=text, run=name), run=name)
    (problem,) = problems(derive_report(facts))
    assert "must be the settings that the sites received" in str(problem)
    run.write(signing.sign_report(derive_report(facts), run.lead))
    assert not run.holds()
    assert not run.holds_by_the_other_program()


def test_reasons_for_an_early_end_never_lower_the_epsilon(run: Deployed) -> None:
    facts = resign_receipts(drop_rounds(run.facts, 1, final={}, detail=None), charged_rounds=1)
    used_up = replace(facts.rounds[0], round=2, sites=(), failed_sites=dict.fromkeys(SITES, "plan_exhausted"))
    report = derive_report(replace(facts, rounds=(*facts.rounds, used_up)))
    assert [site.spent for site in report.sites] == [site.spent for site in derive_report(facts).sites]
    planned_epsilon, early_epsilon = report.sites[0].spent.planned_epsilon, report.sites[0].spent.epsilon_pld
    assert early_epsilon < 0.7 * planned_epsilon == 0.7 * report.epsilon
    sites = tuple(replace(site, spent=replace(site.spent, epsilon=early_epsilon)) for site in report.sites)
    run.write(signing.sign_report(replace(report, sites=sites, epsilon=early_epsilon), LEAD))
    assert not run.holds()
    assert not run.holds_by_the_other_program()


@pytest.mark.parametrize("key", [None, STRANGER])
def test_report_without_the_signature_of_the_lead_is_rejected(run: Deployed, key: SigningKey | None) -> None:
    run.write(replace(run.report, signature=None) if key is None else signing.sign_report(run.report, key))
    assert not run.holds()
    assert not run.holds_by_the_other_program()


def test_revoked_site_of_a_run_is_named(run: Deployed, capsys: Any) -> None:
    known = {"key": run.lead.public, "site_keys": {site: make_site_key(site).public for site in SITES}}
    found = run.checks(**known, revoked={"south": "2026-01-01T00:00:00+00:00", "other": "2026-01-01T00:00:00+00:00"})
    (keys,) = [check for check in found if check.name == "site keys"]
    assert keys.state == "passed", "a site may leave after a run"
    assert keys.text.endswith("in the roster. south was revoked at 2026-01-01T00:00:00+00:00.")
    write_roster(run.roster, run.lead, south="2026-01-01T00:00:00+00:00")
    assert run.holds_by_the_other_program()
    assert capsys.readouterr().out.strip().endswith("; south was revoked at 2026-01-01T00:00:00+00:00)")


@pytest.mark.parametrize("figures", [{"epsilon": 0.01}, {"verdict": {"state": "exceeded", "reasons": []}}])
def test_underivable_figures_are_rejected(run: Deployed, figures: dict[str, Any]) -> None:
    text = json.loads(signing.report_to_json(run.report)) | figures
    report = signing.from_json(json.dumps(text))
    run.write(signing.sign_report(report, run.lead))
    assert not run.holds()
    assert not run.holds_by_the_other_program()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"another adapter"),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"a second one"),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "fedtune.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").symlink_to("adapter_model.safetensors"),
        lambda folder: write_nested_card(folder),
    ],
)
def test_report_for_a_different_model_is_rejected(run: Deployed, change: Callable[[Path], None]) -> None:
    change(run.folder / "adapter")
    (files,) = [check for check in run.checks() if check.name == "files"]
    assert files.state == "failed"
    assert not run.holds_by_the_other_program()


def write_nested_card(folder: Path) -> None:
    """A file with the name of the model card, at another place."""
    (folder / "more").mkdir()
    (folder / "more" / "README.md").write_text("weights of anybody")


def add_to_weights(folder: Path) -> None:
    """Change the weights that the sites trained, with the hash that the adapter's settings state."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    changed = next(name for name in tensors if ".lora_B." in name)
    save_file(tensors | {changed: tensors[changed] + 1}, path)
    heads = {f"head.{name}": item for name, item in load_file(folder / "head.safetensors").items() if name != "center"}
    edit_json(folder / "fedtune.json", trained_sha256=Adapter(load_file(path) | heads).digest())


def swap_head(folder: Path) -> None:
    """Call the head frozen and hide its signed tensors among the weights, so that another head has no hash."""
    weights, head = folder / "adapter_model.safetensors", folder / "head.safetensors"
    signed = {f"head.{name}": entry for name, entry in load_file(head).items() if name != "center"}
    save_file(load_file(weights) | signed, weights)
    save_file({name: entry + 1 for name, entry in load_file(head).items()}, head)
    settings = json.loads((folder / "fedtune.json").read_text())
    edit_json(folder / "fedtune.json", head={**settings["head"], "train": False})


def add_magnitudes(folder: Path) -> None:
    """Add a tensor that no site trains, which PEFT would read as the norms of DoRA."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.x.lora_magnitude_vector": np.ones(4, dtype=np.float32)}, path)


def edit_adapter_settings(folder: Path, file: str = "fedtune.json", group: str = "", **values: Any) -> None:
    """Change settings in one of the adapter's files, in the form in which fedtune writes it."""
    settings = json.loads((folder / file).read_text())
    settings |= {group: settings[group] | values} if group else values
    (folder / file).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def reverse_labels(folder: Path) -> None:
    edit_adapter_settings(folder, labels=json.loads((folder / "fedtune.json").read_text())["labels"][::-1])


def raise_alpha(folder: Path) -> None:
    alpha = 100 * json.loads((folder / "fedtune.json").read_text())["lora"]["alpha"]
    edit_adapter_settings(folder, group="lora", alpha=alpha)
    edit_adapter_settings(folder, "adapter_config.json", lora_alpha=alpha)


def name_another_base(folder: Path) -> None:
    edit_adapter_settings(folder, group="model", sha256=OTHER)


def raise_alpha_for_peft(folder: Path) -> None:
    edit_adapter_settings(folder, "adapter_config.json", lora_alpha=800.0)


def raise_alpha_of_one_module(folder: Path) -> None:
    edit_adapter_settings(folder, "adapter_config.json", alpha_pattern={"query": 800})


def name_another_kind_for_peft(folder: Path) -> None:
    edit_adapter_settings(folder, "adapter_config.json", peft_type="IA3")


@pytest.mark.parametrize("has_settings", [True, False], ids=["whole folder", "report and adapter"])
@pytest.mark.parametrize(
    "forge",
    [
        *(reverse_labels, raise_alpha, raise_alpha_for_peft, raise_alpha_of_one_module),
        *(name_another_kind_for_peft, name_another_base),
        *(
            partial(edit_adapter_settings, file="adapter_config.json", **{key: value})
            for key, value in {
                "target_modules": ["query"],
                "layers_to_transform": [0],
                "exclude_modules": ["value"],
                "trainable_token_indices": [1],
                "alora_invocation_tokens": [101, 102],
                "lora_bias": True,
                "task_type": "SEQ_CLS",
                "revision": "main",
                "an option of the next version": 0.5,
            }.items()
        ),
        *(
            partial(edit_adapter_settings, **{key: value})
            for key, value in {
                "target_range": [0, 9],
                "input": "features",
                "values": ["x"],
                "texts": 2,
                "more": 1,
            }.items()
        ),
    ],
)
def test_adapter_settings_that_no_site_was_sent_are_rejected(
    run: Deployed, forge: Callable[[Path], None], has_settings: bool
) -> None:
    if not has_settings:
        (run.folder / "config.yaml").unlink()
    assert {check.name: check.state for check in run.checks()}["files"] == "passed"
    forge(run.folder / "adapter")
    facts = replace(run.facts, files=from_run.hash_model_files(run.folder))
    run.write(signing.sign_report(derive_report(facts), run.lead))
    assert {check.name: check.state for check in run.checks()}["files"] == "failed"
    assert not run.holds()
    assert not run.holds_by_the_other_program()


@pytest.mark.parametrize("forge", [add_to_weights, swap_head, add_magnitudes])
def test_weights_that_no_site_signed_are_rejected(run: Deployed, forge: Callable[[Path], None]) -> None:
    forge(run.folder / "adapter")
    if forge is swap_head:
        with pytest.raises(ConfigError, match=r"has an unexpected tensor head\.weight in adapter_model\.safetensors"):
            _ = SavedAdapter.read(run.folder / "adapter").tensors
    facts = replace(run.facts, files=from_run.hash_model_files(run.folder))
    run.write(signing.sign_report(derive_report(facts), run.lead))
    assert not run.holds()
    assert not run.holds_by_the_other_program()


@pytest.mark.parametrize("add", [write_nested_card, lambda folder: (folder / "a.bin").touch()])
def test_file_that_no_run_saves_is_rejected_even_if_the_report_names_it(
    run: Deployed, add: Callable[[Path], None]
) -> None:
    add(run.folder / "adapter")
    facts = replace(run.facts, files=from_run.hash_model_files(run.folder))
    run.write(signing.sign_report(derive_report(facts), run.lead))
    assert not run.holds_by_the_other_program()


@pytest.mark.parametrize("predicts_tokens", [True, False])
@pytest.mark.parametrize("target_modules", ["all-linear", ("query", "value")])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_independent_verifier_knows_the_settings_that_peft_reads(
    kind: Any, target_modules: Any, predicts_tokens: bool
) -> None:
    lora = LoraSpec(kind=kind, target_modules=target_modules, rank=2, alpha=3.0, rslora=kind == "lora")
    modules = [f"encoder.layer.{layer}.attention.self.{name}" for layer in (0, 11) for name in ("query", "value")]
    config = make_peft_config(lora, modules, predicts_tokens=predicts_tokens, transposed=False).to_dict()
    config |= {"inference_mode": True, "revision": "main", "peft_version": "9", "base_model_name_or_path": "a/b"}
    own = {key: sorted(one) if isinstance(one, set) else one for key, one in config.items()}
    sent = {"task": "preference" if predicts_tokens else "votes", "lora": json.loads(json.dumps(asdict(lora)))}
    verify_report.check_peft_settings(own, sent, {"revision": "main"}, modules)
    with pytest.raises(verify_report.Wrong, match="modules"):
        verify_report.check_peft_settings(own | {"target_modules": modules[:1]}, sent, {"revision": "main"}, modules)


def test_independent_verifier_knows_the_values_of_features() -> None:
    features = [
        FeatureSpec(columns=("age", "weight"), range=(0.0, 1e3), missing="indicator"),
        FeatureSpec(columns=("ward",), categories=("a", "b")),
        FeatureSpec(columns=("wave",), range=(-1.5, 1.5), size=2),
    ]
    names = [name for entry in features for name in entry.iter_value_names()]
    assert verify_report.value_names(json.loads(json.dumps([asdict(entry) for entry in features]))) == names


def test_repeated_key_that_the_signature_does_not_cover_is_rejected(run: Deployed) -> None:
    path = run.folder / "report.json"
    path.write_text(path.read_text().replace("{\n", '{\n "verdict": {"state": "no_guarantee"},\n', 1))
    with pytest.raises(ConfigError, match="differs from fedtune's output"):
        run.checks()
    assert not run.holds_by_the_other_program()


def test_independent_verifier_knows_the_tensors_of_each_kind_and_task() -> None:
    assert verify_report.TENSORS == TENSOR_FILES
    canonical = {name: task.has_head for name, task in TASKS.items() if type(task).__module__.startswith("fedtune.")}
    assert canonical == verify_report.HEADS


@pytest.mark.parametrize(
    ("task", "hidden"),
    [
        ("classification", None),
        ("token_classification", None),
        ("votes", None),
        ("classification", ()),
        ("classification", (3, 4)),
    ],
)
def test_independent_verifier_knows_the_names_of_a_head(task: str, hidden: tuple[int, ...] | None) -> None:
    """`hidden`: of a model on features; None: of one on text."""
    input = "text" if hidden is None else "features"
    spec = TaskModelSpec(
        model=ModelSpec(path="random:bert" if hidden is None else "none"),
        lora=LoraSpec(kind="lora" if hidden is None else "none"),
        head=HeadSpec(hidden=hidden or ()),
        task=task,
        labels=("a", "b", "c"),
        input=input,
        values=() if hidden is None else ("age",),
    )
    model = SavedAdapter(Path("none"), spec, "")._without_base
    names = {name.removeprefix("head.") for name in model.collect_adapter_parameters()}
    sent = {"task": task, "data": {"input": input}, "head": {"hidden": [*(hidden or ())], "train": True}}
    assert verify_report.head_names(sent, set()) == names | dict(model.named_buffers(recurse=False)).keys()


@pytest.mark.parametrize("sent", ["", "{}", "[]", '{"task": "classification"}'])
def test_report_without_the_sent_settings_is_rejected_with_a_reason(run: Deployed, sent: str) -> None:
    problem = checks._check_model_files(replace(run.facts, sent=sent), None, run.folder / "adapter", None)
    texts = {check.name: check.text for check in problem}
    assert texts["files"] == "The report does not contain the settings that the sites received."


def test_start_epsilon_is_the_leads_word_unless_listed_sites_signed_for_it(run: Deployed) -> None:
    keys = {site: make_site_key(site).public for site in SITES}
    both_keys, stranger = [keys["north"], keys["south"]], [keys["north"], STRANGER.public]
    for signers, trusted, state in (
        (both_keys, keys, "passed"),
        (both_keys, None, "missing"),
        (stranger, keys, "missing"),
        ([], keys, "missing"),
        (None, keys, "missing"),
    ):
        (problem,) = check_start(begin_in_adapter(run.facts, signers), trusted)
        assert problem.state == state
        assert ("is the lead's word" in problem.text) == (state == "missing")
    assert not [*check_start(run.facts, None)], "a run without a start"
    assert not [*check_start(begin_in_adapter(run.facts, epsilon=None), keys)], "nothing is claimed"
    assert not [*check_start(begin_in_adapter(run.facts, public=True), keys)]


def test_start_keys_are_those_that_signed_the_receipts_of_a_real_start(run: Deployed) -> None:
    config = read_saved_config(run.folder)
    start = derive_start(replace(config, model=replace(config.model, adapter=str(run.folder))))
    keys = tuple(sorted(make_site_key(site).public for site in SITES))
    assert start["start_keys"] == (None if run.lead is LEAD else keys), (
        "the simulation's checkpoint is not of real sites"
    )


def test_export_of_real_sites_is_only_the_leads_word(run: Deployed) -> None:
    (export := run.folder.parent / "export").mkdir()
    (export / "model.safetensors").write_bytes(b"weights of anybody")
    RunFolder(run.folder).record_export(export)
    facts = replace(run.facts, files=from_run.hash_model_files(run.folder))
    run.write(signing.sign_report(derive_report(facts), run.lead))
    assert run.holds(), "the adapter is the one that the sites signed"
    (files,) = [check for check in run.checks(model=export) if check.name == "files"]
    assert files.state == "missing"
    assert "sites did not sign it" in files.text
    options = ("--key", run.lead.public, "--roster", str(run.roster), "--model", str(export))
    assert not run.holds_by_the_other_program(*options)


def test_empty_model_folder_is_rejected(run: Deployed) -> None:
    empty = run.folder.parent / "empty"
    empty.mkdir()
    assert [check.state for check in run.checks(model=empty) if check.name == "files"] == ["failed"]
    assert not run.holds_by_the_other_program("--key", LEAD.public, "--roster", str(run.roster), "--model", str(empty))


def test_page_rendered_by_another_version_is_rejected(run: Deployed) -> None:
    provenance = replace(run.facts.provenance, fedtune_version="0.0.1")
    run.write(signing.sign_report(derive_report(replace(run.facts, provenance=provenance)), run.lead))
    assert run.holds()
    (run.folder / "report.html").write_text("another page")
    assert not run.holds()


HONEST: dict[str, tuple[str, Callable[[Report], Report]]] = {
    **{name: (name, replace) for name in ("run", "run_without_privacy", "secure", "ledger")},
    "arrivals": ("ledger", add_arrivals),
    "admitting": ("run", add_admission),
    "drifting": ("run", add_drift),
    "exceeded": ("run", lambda report: derive_report(replace(report.facts, target_epsilon=0.5))),
    "seeded": (
        "run",
        lambda one: derive_report(sign_by_sites(replace(one.facts, seeded_noise=True, randomness="seeded"))),
    ),
    "silent": ("run", lambda report: derive_report(remove_receipts(report.facts, "south-hospital"))),
}


@pytest.mark.parametrize("name", HONEST)
def test_independent_verifier_accepts_valid_reports(name: str, tmp_path: Path, capsys: Any) -> None:
    base, change = HONEST[name]
    facts = change(load_report_on_file(base)()).facts
    report = derive_report(replace(facts, simulated=True) if base == "ledger" else replace(facts, files={}))
    (tmp_path / "report.json").write_text(signing.report_to_json(report))
    assert verify_report.main([str(tmp_path)]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"HOLDS {report.verdict.state}: epsilon ")
    assert hold(check_report(tmp_path / "report.json", report, TrustedValues()))


def test_independent_verifier_checks_simulations_and_site_reports(folder: Path) -> None:
    assert verify_report.main([str(folder)]) == 0
    site = folder / "sites" / "site-1"
    report = signing.sign_report(
        from_ledger.build_ledger_report(site / "site.toml"), SigningKey.load(site / "site_key.pem")
    )
    (site / "report.json").write_text(signing.report_to_json(report))
    for key, code in ((report.signature.key, 0), (LEAD.public, 1)):
        assert verify_report.main([str(site), "--key", key]) == code
    cheaper = replace(report.facts, charges=report.facts.charges[:1])
    assert report.facts.verification.num_events > len(cheaper.charges)
    (site / "report.json").write_text(signing.report_to_json(replace(report, facts=cheaper)))
    assert verify_report.main([str(site)]) == 1, "it is not what the site signed"


def test_independent_verifier_epsilon_is_a_tight_upper_bound() -> None:
    draws = random.Random(20_260_301)
    plans = [(0.2, 8.0, 3, 1e-5), (0.05, 8.0, 1000, 1e-5), (1.0, 5.0, 10, 1e-5)]  # where its grid is coarsest
    plans += [(1.0, 0.12, 1, 1e-5), (0.1, 0.1, 10, 1e-5)]  # losses far above those of any useful guarantee
    plans += [(10 ** draws.uniform(-2, -0.5), draws.uniform(0.7, 4), draws.randrange(1, 300), 1e-6) for _ in range(4)]
    for rate, noise, steps, delta in plans:
        problem = verify_report.epsilon_of({(rate, noise): steps}, delta)
        event = events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=steps)
        tight = accountant.epsilon_pld([event], delta)
        assert (1 - 1e-4) * tight <= problem <= (1 + verify_report.SLACK / 2) * tight


@pytest.mark.parametrize("share", [0.985, 1 - 3e-3])
def test_independent_verifier_refuses_slightly_smaller_epsilons(share: float, tmp_path: Path, capsys: Any) -> None:
    report = derive_report(replace(load_report_on_file("run")().facts, files={}))
    text = json.loads(signing.report_to_json(report))
    text["epsilon"] *= share
    for site in text["sites"]:
        site["spent"]["epsilon"] *= share
        site["spent"]["epsilon_pld"] *= share
    write_json(tmp_path / "report.json", text)
    assert verify_report.main([str(tmp_path)]) == 1
    assert "found at most" in capsys.readouterr().out


def write_json(path: Path, fields: Any) -> None:
    """Write a report's fields as fedtune formats them."""
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n")


def rename_charges(facts: Any) -> None:
    for charge in facts["charges"]:
        charge["run"] = ""


CONTRADICTIONS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no charges": ("was charged 0 rounds, and", lambda facts: facts["charges"].clear()),
    "first charge missing": ("updates left", lambda facts: facts["charges"].pop(0)),
    "charges of no run": ("updates left", rename_charges),
    "charge of an unknown run": (
        "belongs neither to a run nor to lost rounds",
        lambda facts: facts["charges"].append(facts["charges"][-1] | {"run": "unknown"}),
    ),
    "negative rounds": ("has invalid counts: ['rounds -1']", lambda facts: facts["charges"][0].update(rounds=-1)),
    "fractional rounds": ("has invalid counts", lambda facts: facts["charges"][0].update(rounds=0.5)),
    "delta of 2": ("its delta is 2.0", lambda facts: facts.update(delta=2.0)),
    "another delta": ("has another unit or delta", lambda facts: facts["runs"][0]["plan"].update(delta=1e-3)),
    "unknown noise": ("KeyError: 'no'", lambda facts: facts["runs"][0]["plan"].update(noise="no")),
    "later charge": (
        "not in order, or later than the report",
        lambda facts: facts["charges"][-1].update(day="2999-01-01"),
    ),
    "negative colluders": ("has invalid counts: ['colluders -9']", lambda facts: facts.update(colluders=-9)),
    "run twice": ("it lists a run twice", lambda facts: facts["runs"].append(facts["runs"][0])),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_independent_verifier_refuses_contradictory_ledgers(name: str, tmp_path: Path, capsys: Any) -> None:
    message, contradict = CONTRADICTIONS[name]
    report = derive_report(replace(load_report_on_file("ledger")().facts, simulated=True))
    fields = json.loads(signing.report_to_json(report))
    contradict(fields["facts"])
    write_json(tmp_path / "report.json", fields)
    assert verify_report.main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("changed", [{"sampling_rate": 0.0}, {"sampling_rate": 1.5}, {"shared": {"threshold": 9}}])
def test_independent_verifier_refuses_mechanisms_that_no_plan_has(changed: dict[str, Any]) -> None:
    plan = json.loads(signing.report_to_json(load_report_on_file("secure")()))["facts"]["plan"]
    changed = {key: plan[key] | one if key == "shared" else one for key, one in changed.items()}
    with pytest.raises(verify_report.Wrong, match=r"no mechanism has the rate|no sum of 9 of 5 sites"):
        verify_report.events_of(plan | changed, 1)


def test_independent_verifier_refuses_a_run_with_a_delta_above_1(tmp_path: Path, capsys: Any) -> None:
    fields = json.loads(signing.report_to_json(load_report_on_file("run")()))
    fields["facts"]["plan"]["delta"] = 1.5
    write_json(tmp_path / "report.json", fields)
    assert verify_report.main([str(tmp_path)]) == 1
    assert "its delta is 1.5" in capsys.readouterr().out


def test_independent_verifier_refuses_other_bytes_and_weak_signatures(tmp_path: Path, capsys: Any) -> None:
    report = signing.sign_report(derive_report(replace(load_report_on_file("ledger")().facts, simulated=True)), LEAD)
    path, text = tmp_path / "report.json", signing.report_to_json(report)
    signature = report.signature.signature
    for changed, message in (
        (text.replace(": ", ":  ", 1), "is not written as fedtune writes a report"),
        (text[:-1], "is not written as fedtune writes a report"),
        (text.replace(signature, signature.upper()), "its signature does not fit the report"),
        (text.replace(LEAD.public, "01" + "00" * 31), "its signature does not fit the report"),
    ):
        assert changed != text
        path.write_text(changed)
        assert verify_report.main([str(path)]) == 1
        assert message in capsys.readouterr().out
    fields = json.loads(text)
    fields["signature"]["note"] = "approved"
    write_json(path, fields)
    assert verify_report.main([str(path)]) == 1
    assert "has other fields than a key and a signature" in capsys.readouterr().out


def test_independent_verifier_knows_the_keys_of_small_order() -> None:
    message, trivial = b"fedtune report\0{}", "01" + "00" * 63
    for key in keys._SMALL_ORDER:
        for encoded in (key, key[:62] + f"{int(key[62:], 16) | 0x80:02x}"):
            assert not verify_report.is_signed(encoded, "report", message, trivial)
            assert int.from_bytes(bytes.fromhex(encoded), "little") % 2**255 in verify_report.SMALL_ORDER
    assert len(verify_report.SMALL_ORDER) == len(keys._SMALL_ORDER)


def test_independent_verifier_refuses_a_site_report_from_before_the_run() -> None:
    facts = json.loads(signing.report_to_json(load_report_on_file("run")()))["facts"]
    site, this_run = facts["sites"][0], {"run": facts["run"], "rounds": 1}
    assert verify_report.rounds_of(facts, site | {"statement": {"lifetime": {"runs": [this_run]}}}) > 0
    with pytest.raises(verify_report.Wrong, match="was made before this run"):
        verify_report.rounds_of(facts, site | {"statement": {"lifetime": {"runs": []}}})


def test_verdict_of_the_independent_verifier_follows_from_its_own_epsilon() -> None:
    facts = json.loads(signing.report_to_json(load_report_on_file("run")()))["facts"] | {"target_epsilon": 2.0}
    site = facts["sites"][0] | {"statement": None}
    for epsilon, state in ((1.99, "within"), (2.0, "within"), (2.01, "exceeded"), (math.inf, "no_guarantee")):
        assert verify_report.state_at(facts, site, epsilon, 1) == state


@pytest.mark.parametrize("text", ["[]", "null", "1", '"text"', "{", '{"schema_version": 10, "facts": []}'])
def test_independent_verifier_refuses_malformed_reports(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "report.json").write_text(text)
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300)):
        assert verify_report.main([str(path)]) == 1
        assert capsys.readouterr().out.startswith("DOES NOT HOLD: ")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_independent_verifier_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    assert verify_report.main([str(tmp_path)]) == 1
