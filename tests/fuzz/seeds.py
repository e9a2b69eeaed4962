"""A valid input of each kind that is parsed, each built once."""

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config import RunConfig
from fedtune.federation.protocol import Reply, RoundRequest
from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.release import Receipt, Update
from fedtune.privacy.site_policy import Asserted, Policy
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.sites.virtual_site import generate_policy

from ..builders import round_request
from ..privacy.builders import make_key, train
from ..sites.conftest import make_letters


@cache
def make_folder() -> Path:
    """Make the folder for files of this process."""
    return Path(tempfile.mkdtemp(prefix="fedtune-fuzz-"))


key = make_key
"""Key 1 is the lead's, key 2 the site's."""


@cache
def make_config() -> RunConfig:
    """Make the lead's configuration of a run over two sites."""
    return make_letters(runtime={"seeded_noise": False})


@cache
def make_settings() -> dict[str, Any]:
    """Make the settings that the sites receive."""
    sent: dict[str, Any] = json.loads(json.dumps(select_settings_for_sites(make_config()).to_json()))
    return sent


def list_decisive_settings() -> str:
    """List the settings covered by their digest, which is a part of the run's name."""
    return json.dumps(select_settings_for_sites(make_config()).decisive(), sort_keys=True)


def plan() -> Any:
    return select_settings_for_sites(make_config()).plan()


@cache
def make_policy() -> Policy:
    policy = generate_policy(select_settings_for_sites(make_config()), plan(), "north", lead=key(1).public)
    budget = replace(policy.budget, max_epsilon=5 * policy.budget.max_epsilon)
    return replace(policy, budget=budget, simulated=False, asserted=Asserted(no_person_at_another_site=True))


@cache
def read_policy_toml() -> str:
    path = make_folder() / "policy.toml"
    write_policy(make_policy(), path)
    return path.read_text()


@cache
def make_adapter() -> Adapter:
    values = np.random.default_rng(5).normal(size=(2, 3)).astype(np.float32)
    return Adapter({"b.lora_A": values, "head.weight": np.linspace(-1, 1, 4, dtype=np.float32)})


def make_receipt() -> Receipt:
    fields = {"site": "north", "run": "r", "charged_rounds": 1, "sequence": 4, "head": "ab" * 32}
    fields |= {"ended": False, "plan": "12" * 32, "seeded_noise": False, "simulated": False}
    return Receipt(**fields, site_key=key(2).public, signature="cd" * 64)


def request() -> RoundRequest:
    proposal = select_settings_for_sites(make_config()).proposal(lead=key(1).public, plan=plan())
    return round_request(proposal, site="north", adapter_digest=make_adapter().digest(), receipt=make_receipt())


def request_json() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(request().sign_with(key(1)).text)
    return fields


def update() -> Update:
    return Update(site="north", run="r", round=1, tensors=make_adapter().tensors, scores=(0.5, 0.25))


def reply() -> Reply:
    return Reply(body=update(), receipt=make_receipt())


@cache
def make_ledger() -> bytes:
    """Make the file of a ledger with two charged rounds; its anchor is next to it as ledger.anchor."""
    path = make_folder() / "seed" / "ledger.db"
    path.parent.mkdir()
    ledger = SiteLedger(path, make_policy(), key(2), anchor=path.with_suffix(".anchor"), create=True)
    train(ledger, request().proposal, 1, 2, reply=update().to_bytes())
    return path.read_bytes()


@cache
def anchor() -> dict[str, Any]:
    """Make the anchor of `ledger`."""
    make_ledger()
    fields: dict[str, Any] = json.loads((make_folder() / "seed" / "ledger.anchor").read_bytes())
    return fields


@cache
def run_folder() -> Path:
    """Make a finished run of the smallest kind, with a report."""
    import fedtune
    from fedtune.report import from_run, signing

    small = {"data.train_fraction": 0.02, "data.declared_sizes": 90, "data.validation_rows": 10, "data.test_rows": 10}
    here = {"runtime.device": "cpu", "runtime.num_threads": 1, "privacy.noise_multiplier": 4.0, "data.max_length": 16}
    named = {"name": "run", "tracking": "quiet", "tracking.output_dir": str(make_folder())}
    into: Path = fedtune.simulate("debug", small | here | named).folder
    (into / "report.json").write_text(signing.report_to_json(from_run.build_run_report(into)))
    return into
