"""What a site puts in the place of a lead's settings: its own files, columns, machine and models, and nobody else's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import RunConfig
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_policy import Dataset, Machine, Policy
from fedtune.sites.shared_settings import at_site, for_sites
from fedtune.sites.virtual_site import generated_policy
from fedtune.spec import ConfigError

from ..privacy.builders import reason_of
from .conftest import COLUMNS, letters

HASH = "ab" * 32
FOLDER = Path("/srv/site")
STORE = Path("/srv/site/kit/models")


@pytest.fixture
def policy(lead_key: SigningKey) -> Policy:
    """A policy with places, columns and a machine of its own, and a second data set."""
    sent = for_sites(letters())
    made = generated_policy(sent, sent.plan(), "north", lead=lead_key.public)
    letters_of_north = Dataset(id="letters", declared_size=40, path="private/mail.csv", columns=COLUMNS)
    machine = Machine(device="cpu", num_devices=2, num_threads=3, micro_batch_tokens=77, kept_states_mib=5)
    machine = replace(machine, gradient_checkpointing=True)
    other = Dataset(id="notes", declared_size=40, path="/elsewhere/notes.jsonl")
    return replace(made, dataset=(other, letters_of_north), machine=machine)


def nothing_installed(sha256: str) -> Path:
    raise ConfigError("base model", sha256, "is not installed")


def here(
    sent: RunConfig, policy: Policy, *, folder: Path = FOLDER, installed: Callable[[str], Path] = nothing_installed
) -> RunConfig:
    return at_site(sent, policy, folder=folder, installed=installed)


def test_files_columns_and_machine_are_the_sites_own(policy: Policy) -> None:
    # Such settings come from no fedtune: a lead that writes its own may say anything.
    hostile = letters(
        data={"train_file": "/etc/passwd", "columns": {"text": "password", "label": "name"}},
        runtime=dict.fromkeys(("kept_states_folder", "sites_dir"), "/etc")
        | {"device": "cuda", "num_devices": 9, "num_threads": 99, "micro_batch_tokens": 1 << 40},
    )
    config = here(hostile, policy)
    assert config.data.train_file == "/srv/site/private/mail.csv"
    assert config.data.columns == {"text": "body", "label": "kind"}
    runtime = config.runtime
    assert (runtime.device, runtime.num_devices, runtime.num_threads) == ("cpu", 2, 3)
    assert runtime.micro_batch_tokens == 77
    assert runtime.kept_states_folder is None
    there = replace(policy, machine=replace(policy.machine, kept_states_folder="fast"))
    assert here(hostile, there).runtime.kept_states_folder == "/srv/site/fast"
    assert runtime.onednn
    slower = replace(policy, machine=replace(policy.machine, onednn=False))
    assert not here(hostile, slower).runtime.onednn
    assert (runtime.kept_states_mib, runtime.gradient_checkpointing, runtime.sites_dir) == (5, True, None)
    assert here(letters(), replace(policy, machine=Machine())).runtime.num_threads is None, "every core"
    assert runtime.seeded_noise is hostile.runtime.seeded_noise, "as the policy allowed it"


def test_of_the_site_s_columns_the_run_s_layout_is_read(policy: Policy) -> None:
    columns = {"text": "body", "label": "kind", "messages": "chat", "prompt": "question", "completion": "answer"}
    several = replace(policy, dataset=(policy.dataset[0], replace(policy.dataset[1], columns=columns)))

    def read(*roles: str, **data: object) -> dict[str, str]:
        named = {"columns": {role: role for role in roles}, "labels": (), **data}
        return dict(here(for_sites(letters(task="causal_lm", data=named)), several).data.columns)

    assert read("messages", chat_template="plain") == {"messages": "chat"}
    assert read("text") == {"text": "body"}
    assert read("prompt", "completion") == {"prompt": "question", "completion": "answer"}
    prompted = letters(task="causal_lm", data={"columns": {"prompt": "p", "completion": "c"}, "labels": ()})
    assert reason_of(here, for_sites(prompted), policy) is Reason.SETTINGS, "a role that the site's data has not got"


def test_the_data_set_is_the_one_that_the_run_names(policy: Policy) -> None:
    columns = {"columns": {"text": "t", "label": "l"}}
    notes = replace(policy, dataset=(replace(policy.dataset[0], **columns), policy.dataset[1]))
    assert here(letters(data={"dataset": "notes"}), notes).data.train_file == "/elsewhere/notes.jsonl"
    assert reason_of(here, letters(data={"dataset": "unheard-of"}), policy) is Reason.DATASET


def test_what_is_trained_stays_as_it_was_sent(policy: Policy) -> None:
    sent = for_sites(letters(lora={"rank": 3}, training={"local_steps": 1}))
    config = here(sent, policy)
    same = ("name", "task", "lora", "head", "privacy", "training", "federation", "seed")
    assert all(getattr(config, key) == getattr(sent, key) for key in same)


PLACES = ["/", "/etc", "./models/x", "models/x", "../x", "~/x", "org/name", "minilm", "at-site", "package:a/..weights"]


@pytest.mark.parametrize("path", PLACES)
def test_a_lead_names_no_place_of_this_machine_and_no_download(policy: Policy, path: str) -> None:
    with pytest.raises(Refused) as refused:
        here(letters(model={"path": path, "sha256": HASH}), policy)
    assert (refused.value.reason, refused.value.asked) == (Reason.BASE_MODEL_MISSING, HASH)


def test_the_folder_of_a_start_adapter_is_not_opened_whatever_a_lead_sends(policy: Policy) -> None:
    model = here(letters(model={"adapter": "/etc", "adapter_sha256": HASH}), policy).model
    assert (model.adapter, model.adapter_sha256) == (None, HASH)


@pytest.mark.parametrize("path", ["random:bert", "package:some_weights/model", "/etc", "org/name"])
def test_a_model_without_a_hash_is_refused(policy: Policy, path: str) -> None:
    assert reason_of(here, letters(model={"path": path, "sha256": None}), policy) is Reason.BASE_MODELS


@pytest.mark.parametrize("path", [*PLACES, "package:some_weights/model"])
def test_an_installed_model_is_taken_whatever_the_lead_says(policy: Policy, path: str) -> None:
    model: dict[str, Any] = {"path": path, "sha256": HASH, "gguf_file": "a.gguf", "revision": "x", "cache_dir": "/etc"}
    model["adapter"] = "/etc"
    taken = here(letters(model=model), policy, installed=lambda sha256: STORE / sha256).model
    assert (taken.path, taken.sha256, taken.gguf_file) == (str(STORE / HASH), HASH, "a.gguf")
    assert (taken.revision, taken.cache_dir, taken.adapter) == (None, None, None)


def test_packages_and_made_up_models_need_no_store(policy: Policy) -> None:
    packaged: dict[str, Any] = {"path": "package:some_weights/model", "sha256": HASH, "cache_dir": "/etc"}
    taken = here(letters(model={**packaged, "gguf_file": "a.gguf"}), policy).model
    assert (taken.path, taken.cache_dir, taken.gguf_file) == ("package:some_weights/model", None, "a.gguf")
    assert here(letters(), policy).model.path == "random:bert"
