"""A site replaces a lead's settings with its own files, columns, machine and models, and with no one else's."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from fedtune.config import RunConfig
from fedtune.lab.preparation.check_data import check
from fedtune.model.base_model import hash_model
from fedtune.model.spec import ModelSpec
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_policy import Dataset, Policy
from fedtune.sites.shared_model import LoadedModel
from fedtune.sites.shared_settings import derive_settings_for_own_site, localize_settings, select_settings_for_sites
from fedtune.sites.virtual_site import generate_policy
from fedtune.spec import ConfigError, RunError
from fedtune.tasks.inputs import NoTokenizer
from fedtune.training.spec import Machine

from ..privacy.builders import read_refusal_reason
from .conftest import COLUMNS, LABELS, TABLE, make_letters, write_records

HASH = "ab" * 32
FOLDER = Path("/srv/site")
STORE = Path("/srv/site/kit/models")


@pytest.fixture
def policy(lead_key: SigningKey) -> Policy:
    """A policy with its own paths and columns, and a second data set."""
    sent = select_settings_for_sites(make_letters())
    generated = generate_policy(sent, sent.plan(), "north", lead=lead_key.public)
    letters_of_north = Dataset(id="letters", declared_size=40, path="private/mail.csv", columns=COLUMNS)
    other_dataset = Dataset(id="notes", declared_size=40, path="/elsewhere/notes.jsonl")
    return replace(generated, dataset=(other_dataset, letters_of_north))


def localize_at_site(sent: RunConfig, policy: Policy, machine: Machine = Machine(), **options: Any) -> RunConfig:  # noqa: B008
    """Localize settings at a site without installed models, unless a keyword changes that."""
    not_installed = Mock(side_effect=ConfigError("base model", "ab", "is not installed"))
    return localize_settings(sent, policy, machine, folder=FOLDER, **{"installed": not_installed, **options})


def test_files_columns_and_machine_settings_come_from_the_site(policy: Policy) -> None:
    # fedtune sends no such settings, but a lead that writes its own can send anything.
    hostile = make_letters(
        data={"train_file": "/etc/passwd", "columns": {"text": "password", "label": "name"}},
        runtime=dict.fromkeys(("kept_states_folder", "sites_dir"), "/etc")
        | {"device": "cuda", "num_devices": 9, "num_threads": 99, "micro_batch_tokens": 1 << 40},
    )
    sizes = {"num_devices": 2, "num_threads": 3, "micro_batch_tokens": 77, "kept_states_mib": 5}
    machine = Machine(device="cpu", gradient_checkpointing=True, **sizes)
    config = localize_at_site(hostile, policy, machine)
    assert config.data.train_file == "/srv/site/private/mail.csv"
    assert config.data.columns == {"text": "body", "label": "kind"}
    runtime = config.runtime
    assert (runtime.device, runtime.num_devices, runtime.num_threads) == ("cpu", 2, 3)
    assert runtime.micro_batch_tokens == 77
    assert runtime.kept_states_folder is None
    with_folder = replace(machine, kept_states_folder="fast")
    assert localize_at_site(hostile, policy, with_folder).runtime.kept_states_folder == "/srv/site/fast"
    assert runtime.onednn
    assert not localize_at_site(hostile, policy, replace(machine, onednn=False)).runtime.onednn
    assert (runtime.kept_states_mib, runtime.gradient_checkpointing, runtime.sites_dir) == (5, True, None)
    assert localize_at_site(make_letters(), policy).runtime.num_threads is None, "the site must use all cores"
    assert runtime.seeded_noise is hostile.runtime.seeded_noise, "the policy allows it"


def test_only_columns_required_by_the_layout_are_read(policy: Policy) -> None:
    columns = {"text": "body", "label": "kind", "messages": "chat", "prompt": "question", "completion": "answer"}
    several = replace(policy, dataset=(policy.dataset[0], replace(policy.dataset[1], columns=columns)))

    def read(*roles: str, **data: object) -> dict[str, str]:
        data_fields = {"columns": {role: role for role in roles}, "labels": (), **data}
        return dict(
            localize_at_site(
                select_settings_for_sites(make_letters(task="causal_lm", data=data_fields)), several
            ).data.columns
        )

    assert read("messages", chat_template="plain") == {"messages": "chat"}
    assert read("text") == {"text": "body"}
    assert read("prompt", "completion") == {"prompt": "question", "completion": "answer"}
    prompted = make_letters(task="causal_lm", data={"columns": {"prompt": "p", "completion": "c"}, "labels": ()})
    assert read_refusal_reason(localize_at_site, select_settings_for_sites(prompted), policy) is Reason.SETTINGS, (
        "the site's data has no column for a role"
    )


def test_site_without_the_second_text_column_is_refused(policy: Policy) -> None:
    columns = {"text": "t", "text_pair": "other", "label": "l"}
    sent = select_settings_for_sites(make_letters(data={"columns": columns}))
    assert read_refusal_reason(localize_at_site, sent, policy) is Reason.SETTINGS, (
        "single texts must not be trained on silently"
    )
    changed_policy = replace(policy, dataset=(policy.dataset[0], replace(policy.dataset[1], columns=columns)))
    assert dict(localize_at_site(sent, changed_policy).data.columns) == columns


def test_data_set_named_by_the_run_is_used(policy: Policy) -> None:
    columns = {"columns": {"text": "t", "label": "l"}}
    notes = replace(policy, dataset=(replace(policy.dataset[0], **columns), policy.dataset[1]))
    assert localize_at_site(make_letters(data={"dataset": "notes"}), notes).data.train_file == "/elsewhere/notes.jsonl"
    assert read_refusal_reason(localize_at_site, make_letters(data={"dataset": "unheard-of"}), policy) is Reason.DATASET


def test_training_settings_are_unchanged_at_the_site(policy: Policy) -> None:
    sent = select_settings_for_sites(make_letters(lora={"rank": 3}, training={"local_steps": 1}))
    config = localize_at_site(sent, policy)
    unchanged_groups = ("name", "task", "lora", "head", "privacy", "training", "federation", "seed")
    assert all(getattr(config, key) == getattr(sent, key) for key in unchanged_groups)


PLACES = ["/", "/etc", "./models/x", "models/x", "../x", "~/x", "org/name", "minilm", "at-site", "package:a/..weights"]


@pytest.mark.parametrize("path", PLACES)
def test_local_paths_and_downloads_from_a_lead_are_refused(policy: Policy, path: str) -> None:
    with pytest.raises(Refused) as refused:
        localize_at_site(make_letters(model={"path": path, "sha256": HASH}), policy)
    assert (refused.value.reason, refused.value.requested) == (Reason.BASE_MODEL_MISSING, HASH)


def test_start_adapter_folder_from_a_lead_is_never_opened(policy: Policy) -> None:
    model = localize_at_site(make_letters(model={"adapter": "/etc", "adapter_sha256": HASH}), policy).model
    assert (model.adapter, model.adapter_sha256) == (None, HASH)


@pytest.mark.parametrize("path", ["random:bert", "package:some_weights/model", "/etc", "org/name"])
def test_model_without_a_digest_is_refused(policy: Policy, path: str) -> None:
    assert (
        read_refusal_reason(localize_at_site, make_letters(model={"path": path, "sha256": None}), policy)
        is Reason.BASE_MODELS
    )


@pytest.mark.parametrize("path", [*PLACES, "package:some_weights/model"])
def test_installed_model_replaces_the_path_of_the_lead(policy: Policy, path: str) -> None:
    model: dict[str, Any] = {"path": path, "sha256": HASH, "gguf_file": "a.gguf", "revision": "x", "cache_dir": "/etc"}
    model["adapter"] = "/etc"
    taken = localize_at_site(make_letters(model=model), policy, installed=lambda sha256: STORE / sha256).model
    assert (taken.path, taken.sha256, taken.gguf_file) == (str(STORE / HASH), HASH, "a.gguf")
    assert (taken.revision, taken.cache_dir, taken.adapter) == (None, None, None)


def test_package_and_random_models_need_no_installation(policy: Policy) -> None:
    packaged: dict[str, Any] = {"path": "package:some_weights/model", "sha256": HASH, "cache_dir": "/etc"}
    model = localize_at_site(make_letters(model={**packaged, "gguf_file": "a.gguf"}), policy).model
    assert (model.path, model.cache_dir, model.gguf_file) == ("package:some_weights/model", None, "a.gguf")
    assert localize_at_site(make_letters(), policy).model.path == "random:bert"


# A table: the site's own column names, its policy, and unusable rows.

GOOD = [(f"{20 + number}", "ab"[number % 2], LABELS[number % 3]) for number in range(40)]


@pytest.fixture
def site(station: Any) -> Any:
    """The site north, whose file has another name for the column age."""
    table_site = station(**TABLE)
    table_site.first = LoadedModel(make_letters(**TABLE)).initial_adapter
    table_site.edit(dataset={"columns": {"label": "KIND", "feature:age": "AGE_YEARS"}})
    return table_site


def write(site: Any, rows: list[tuple[str, ...]]) -> None:
    write_records(site.data, rows, header=("AGE_YEARS", "ward", "KIND"))
    site.restart()


def test_table_is_trained_with_the_column_names_of_the_site(site: Any) -> None:
    write(site, GOOD)
    update = site.update()
    shapes = {name: tensor.shape for name, tensor in update.tensors.items()}
    assert shapes == {"head.weight": (len(LABELS), 5), "head.bias": (len(LABELS),)}
    sent = select_settings_for_sites(site.config)
    assert sent.model.sha256 == hash_model(ModelSpec(path="none"))
    # As the policy allows.
    proposal = sent.proposal(lead="x", plan=sent.plan())
    assert (proposal.adapter, proposal.base_model, proposal.target_modules) == ("none", sent.model.sha256, ())
    assert proposal.train_head


def test_data_check_reads_the_file_as_training_does(site: Any) -> None:
    write(site, [*GOOD, ("old", "a", LABELS[0])])
    config = derive_settings_for_own_site(site.config, read_policy(site.site_toml), folder=site.folder)
    (file,) = check(config, NoTokenizer()).files
    assert (file.rows, file.uses, sum(file.num_errors.values())) == (41, {"train": 40}, 1)
    sent = select_settings_for_sites(site.config)
    trained = localize_settings(
        sent, read_policy(site.site_toml), Machine(), folder=site.folder, installed=lambda sha256: site.folder
    )
    assert replace(config.data, declared_sizes=trained.data.declared_sizes) == trained.data


def test_lost_ledger_is_noticed_at_the_next_request(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(site, GOOD)
    site.update()
    state = SiteState.in_kit(site.folder)
    monkeypatch.setattr(site.real, "open_ledger", state.open_ledger)
    site.real.site("{}")
    (site.folder / "ledger.db").unlink()
    with pytest.raises(RunError, match="is missing; training is not possible without it"):
        site.real.site("{}")
    site.ledger()  # another ledger in its place
    with pytest.raises(RunError, match="this site used another ledger before"):
        site.real.site("{}")


def test_unusable_rows_do_not_change_the_update(site: Any) -> None:
    write(site, GOOD)
    original = site.update().tensors
    bad_rows = [("old", "a"), ("1e999", "a"), ("", "b"), ("nan", "a"), ("[1]", "b")]
    site.edit(limits={"max_rounds": 99})
    write(site, [*GOOD, *((*tensor, LABELS[0]) for tensor in bad_rows), ("30", "a", "no label")])
    changed = site.update(replace(site.config, name="second"), round=1).tensors
    for name, tensor in changed.items():
        np.testing.assert_array_equal(tensor, original[name])
