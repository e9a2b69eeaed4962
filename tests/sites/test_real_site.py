"""A real site: the settings, records and models that it uses, its checks before it reads data, and what it stores."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest

import fedtune.sites.real_site as real_site
from fedtune.config import RunConfig, read_saved_config
from fedtune.data.partition import split_heldout
from fedtune.federation.bfloat16 import round_difference
from fedtune.federation.protocol import Reply, SumRequest, hash_parts
from fedtune.federation.site_round import answer, answer_step
from fedtune.model.adapter import Adapter
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import Difference, Reason, Refusal, Update
from fedtune.runs.model_comparison import compare_runs
from fedtune.sites.run_records import LeadRecords
from fedtune.sites.shared_model import LeadData, LoadedModel, RunModel
from fedtune.sites.shared_settings import MAX_CHARACTERS, read_settings, select_settings_for_sites
from fedtune.sites.work import SiteWork
from fedtune.spec import ConfigError
from fedtune.tasks import registry
from fedtune.tasks.classification import Classification
from fedtune.tasks.registry import TASKS
from fedtune.tasks.task_model import build_task_model

from ..privacy.builders import stranger_key
from .conftest import LABELS, make_letters, write_records


@pytest.fixture
def site(station: Any) -> Any:
    """The site north."""
    return station()


def change_sent_text(config: RunConfig, **groups: dict[str, Any]) -> str:
    """Return the settings that are sent to sites, with values changed in transit."""
    fields = select_settings_for_sites(config).to_json()
    for group, values in groups.items():
        fields[group] |= values
    return json.dumps(fields)


def read_charged_rounds(reply: Reply) -> int:
    assert reply.receipt.has_valid_signature()
    return reply.receipt.charged_rounds


def test_simulated_policy_is_refused_at_a_real_site(site: Any) -> None:
    site.edit(simulated=True)
    with pytest.raises(ConfigError, match="simulated = true: must be false at a real site"):
        site.ask()


def test_round_is_answered_with_an_update_and_a_receipt(site: Any, first_adapter: Adapter) -> None:
    reply = site.ask()
    assert isinstance(reply.body, Update)
    assert (reply.body.site, reply.body.round) == ("north", 1)
    assert Adapter(reply.body.tensors).has_same_shapes(first_adapter)
    assert Adapter(reply.body.tensors).digest() != first_adapter.digest()
    assert read_charged_rounds(reply) == 1


def test_bfloat16_update_is_the_rounded_difference(site: Any, first_adapter: Adapter) -> None:
    update = site.update().tensors
    reply = site.ask(make_letters(federation={"update_dtype": "bfloat16"}))
    expected = round_difference(update, first_adapter.tensors)
    assert isinstance(reply.body.tensors, Difference)
    for name, rounded in expected.halves.items():
        np.testing.assert_array_equal(reply.body.tensors.halves[name], rounded)
    assert reply.is_signed(), "the receipt must cover the rounded update"


@pytest.mark.parametrize("length", [1, 160, 200, 201, 266])
def test_overlong_run_name_is_refused_without_a_charge(station: Any, length: int) -> None:
    site, plain, long_name = station(), make_letters(), "n" * length
    if length <= 200:
        reply = site.ask(make_letters(name=long_name))
        assert isinstance(reply.body, Update)
        assert read_charged_rounds(reply) == 1
        return
    with pytest.raises(ConfigError, match="of at most 200 letters"):
        make_letters(name=long_name)
    # A site refuses it before any charge, even if the lead does not check.
    digest = select_settings_for_sites(plain).digest()[:32]
    text = json.dumps(select_settings_for_sites(plain).to_json() | {"name": long_name})
    for _ in range(2):
        assert site.refusal(settings=text, run=f"{long_name}-{digest}") is Reason.SETTINGS
    assert site.ledger().history.runs == {}


def test_fewer_records_than_min_units_are_logged_and_change_no_answer(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    site.edit(dataset={"min_units": 40})
    for count, is_small in ((40, False), (39, True)):
        write_records(site.data, [(f"letter {n} of {n % 7}", LABELS[n % 3]) for n in range(count)])
        caplog.clear()
        assert site.refusal(settings="{}") is Reason.SETTINGS
        assert "fewer units" not in caplog.text, "records may be counted only in charged rounds"
        reply = site.ask(round=1 + is_small)
        assert isinstance(reply.body, Update)
        assert ("fewer units than min_units" in caplog.text) == is_small


def test_site_without_disk_space_charges_nothing(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with patch.object(real_site, "write_durably", side_effect=OSError(28, "No space left on device")):
        assert site.refusal() is Reason.SITE_ERROR
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    assert site.refusal() is Reason.SITE_ERROR
    assert site.ledger().history.runs == {}


class Ours(Classification):
    """A task that fedtune does not know."""

    name = "ours"


def test_site_trains_an_allowed_and_installed_plugin_task(station: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, Ours.name, Ours())
    site, changed = station(task=Ours.name), station("south")
    site.update()
    assert changed.refusal(site.config) is Reason.TASKS, "its policy allows only classification"
    sent, request = json.dumps(select_settings_for_sites(site.config).to_json()), site.request(round=2)
    monkeypatch.delitem(TASKS, Ours.name)
    read_settings.cache_clear()
    reply = answer(site.real.site(sent), request.sign_with(site.lead), site.first)
    assert (reply.body.reason, reply.body.allowed) == (Reason.TASKS, "a task that is installed at this site")


def test_settings_from_a_lead_never_import_a_package(station: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = station()
    monkeypatch.setattr(registry, "load_entry_point", Mock(side_effect=AssertionError("a package was imported")))
    sent = json.dumps(select_settings_for_sites(site.config).to_json() | {"task": Ours.name})
    assert site.refusal(settings=sent) is Reason.SETTINGS
    assert not registry.load_entry_point.called


# What a lead can make a site store.


@pytest.fixture
def summing_site(station: Any, tmp_path: Path) -> Any:
    """The site north, which may take part in secure aggregation with two others."""
    names = ("north", "south", "east")
    secure = {"aggregation": "secure", "num_sites": 3, "site_names": names}
    site = station(federation=secure, training={"local_steps": 1})
    members = {name: SigningKey.load_or_create(tmp_path / f"{name}.pem").public for name in names[1:]}
    site.edit(trust={"secure": True, "members": members, "max_epsilon_if_all_collude": None})
    return site


def test_refused_request_leaves_no_files(summing_site: Any) -> None:
    """Regression: an allowed lead requested rounds in sessions that never began, each of a different run."""
    site = summing_site
    for number in range(3):
        config = replace(site.config, seed=1000 + number)
        assert site.refusal(config, session=f"{number:032x}") is Reason.SECURE_STEP
    assert not list(site.folder.glob("runs/*"))
    assert site.ledger().history.runs == {}


def test_stored_settings_omit_padding(site: Any) -> None:
    text = change_sent_text(site.config)
    site.update(settings=text + " " * (MAX_CHARACTERS - len(text)))
    (stored,) = (site.folder / "runs").glob("*.json")
    assert stored.stat().st_size <= len(text.encode())
    assert json.loads(stored.read_bytes()) == json.loads(text)
    site.end(site.first)
    assert len(list((site.folder / "adapters").iterdir())) == 1, "they are read again at the end of the run"


def test_settings_of_uncharged_runs_are_removed(site: Any) -> None:
    site.update()
    (charged_run,) = (site.folder / "runs").glob("*.json")
    (site.folder / "runs" / "never-charged.json").write_text("{}")
    site.update(replace(site.config, name="other", seed=5))
    stored = {file.stem for file in (site.folder / "runs").glob("*.json")}
    assert stored == set(site.ledger().history.runs)
    assert charged_run.stem in stored


def test_unsigned_settings_are_refused_as_another_run_or_plan(site: Any) -> None:
    for changes in ({"training": {"learning_rate": 1.0}}, {"data": {"max_length": 13}}, {"model": {"license": "MIT"}}):
        assert site.refusal(settings=change_sent_text(site.config, **changes)) is Reason.WRONG_RUN, changes
    assert site.refusal(settings=change_sent_text(site.config, privacy={"max_grad_norm": 2.0})) is Reason.PLAN_CHANGED
    assert site.ledger().history.runs == {}


def test_settings_without_this_site_or_with_another_size_are_refused(site: Any) -> None:
    for sites in ({"site_names": ("west", "south")}, {"participants": ("south",)}):
        assert site.refusal(make_letters(federation=sites)) is Reason.WRONG_SITE
    site.edit(dataset={"declared_size": 41})
    assert site.refusal() is Reason.DECLARED_SIZE


# Refused without reading data.


@pytest.fixture
def touched_data(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each access to a model or to records, and make it fail."""
    reached: list[str] = []
    for name in ("LoadedModel", "read_own_records"):
        monkeypatch.setattr(real_site, name, lambda *_, name=name, **__: reached.append(name) or 1 / 0)
    return reached


@pytest.mark.parametrize(
    ("edit", "changes", "reason"),
    [
        ({}, {"lead": stranger_key.public, "key": stranger_key}, Reason.LEADS),
        ({}, {"key": stranger_key}, Reason.WRONG_SIGNATURE),
        ({"budget": {"max_epsilon": 0.01}}, {}, Reason.MAX_EPSILON),
        ({"limits": {"max_local_steps": 1}}, {}, Reason.MAX_LOCAL_STEPS),
        ({"approval": "manual"}, {}, Reason.AWAITING_APPROVAL),
        ({}, {}, Reason.PAUSED),
        ({}, {"expires": 1.0}, Reason.REQUEST_EXPIRED),
        # Signed by an allowed lead, within the policy, but different from the plan that the settings give.
        ({}, {"rank": 1}, Reason.PLAN_CHANGED),
        ({}, {"start_adapter": "cd" * 32}, Reason.PLAN_CHANGED),
    ],
)
def test_refused_request_loads_no_model_or_records(
    site: Any, touched_data: list[str], edit: Any, changes: Any, reason: Reason
) -> None:
    site.edit(**edit)
    if reason is Reason.PAUSED:
        site.paused.touch()
    assert site.refusal(**changes) is reason
    assert touched_data == []
    assert not list((site.folder / "runs").glob("*")), "its settings must not be stored"
    assert site.ledger().history.runs == {}


def test_pending_run_is_stored_with_its_settings(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    state = SiteState.in_kit(site.folder)
    site.waits = state.queue_for_approval
    site.edit(approval="manual")
    assert site.refusal() is Reason.AWAITING_APPROVAL
    (put_up,) = state.list_pending_runs()
    assert put_up.proposal == site.request().proposal
    assert json.loads(put_up.settings) == json.loads(json.dumps(select_settings_for_sites(site.config).decisive()))
    # Runs that nobody could approve are not listed: refused ones, and those whose settings differ from the signed ones.
    assert site.refusal(settings=change_sent_text(site.config, training={"learning_rate": 1.0})) is Reason.WRONG_RUN
    site.paused.touch()
    assert site.refusal() is Reason.PAUSED
    assert state.list_pending_runs() == [put_up]
    site.paused.unlink()
    site.waits = Mock(side_effect=OSError("no space left"))
    assert site.refusal() is Reason.AWAITING_APPROVAL, "also if it cannot be listed"
    assert "no space left" in caplog.text


def test_secure_aggregation_step_cannot_replace_pending_settings(summing_site: Any) -> None:
    site, state = summing_site, SiteState.in_kit(summing_site.folder)
    site.waits = state.queue_for_approval
    site.edit(approval="manual")
    session = {"session": "1" * 32}
    assert site.refusal(**session) is Reason.AWAITING_APPROVAL
    pending, proposal = state.list_pending_runs(), site.request(**session).proposal
    changes = {"proposal": proposal, "site": "north", "expires": 1e12, "parts_digest": hash_parts([])}
    join = SumRequest(**changes, **session, step="join").sign_with(site.lead)
    changed = change_sent_text(site.config, data={"labels": ["invoice", "complaint", "harmless"]})
    for text in (changed, '{"data": {"note": "everything is fine"}}', ""):
        assert answer_step(site.real.site(text), join, []).reason is Reason.AWAITING_APPROVAL
        assert state.list_pending_runs() == pending


def test_allowed_request_loads_the_model(site: Any, touched_data: list[str]) -> None:
    assert site.refusal() is Reason.SITE_ERROR
    assert touched_data == ["LoadedModel"]


@pytest.mark.parametrize("fault", [None, b"a,b\nsecret-17,2\n", b"body,kind,\xff\nsecret-17,praise,\n"])
def test_unreadable_data_file_is_answered_with_an_error_without_details(
    site: Any, fault: bytes | None, caplog: Any
) -> None:
    if fault is None:
        site.data.unlink()
    else:
        site.data.write_bytes(fault)
    reply = site.ask()
    assert isinstance(reply.body, Refusal)
    assert reply.body.reason is Reason.SITE_ERROR
    assert (reply.body.requested, reply.body.allowed) == (None, None)
    # No record is read before its round is charged, or a lead could probe the file for free.
    assert read_charged_rounds(reply) == (fault is not None)
    assert "mail.csv" not in repr(reply)
    assert "mail.csv" in caplog.text
    assert "secret-17" not in caplog.text


# What stays in memory.


@pytest.fixture
def loaded_data(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every model that is loaded and every data file that is read."""
    reads: list[str] = []
    load, read = real_site.LoadedModel, real_site.read_own_records
    monkeypatch.setattr(real_site, "LoadedModel", lambda *of, **rest: reads.append("model") or load(*of, **rest))
    monkeypatch.setattr(real_site, "read_own_records", lambda *of, **rest: reads.append("records") or read(*of, **rest))
    return reads


def test_model_and_records_are_cached_between_rounds(site: Any, loaded_data: list[str]) -> None:
    for round in (1, 2, 2):
        site.update(round=round)
    assert loaded_data == ["model", "records"]
    site.update(make_letters(name="second"))
    site.update(round=3)
    assert loaded_data == ["model", "records", "records", "records"], "only the newest run may stay in memory"
    changed = make_letters(name="third", seed=5)
    site.update(changed, adapter=LoadedModel(select_settings_for_sites(changed)).initial_adapter)
    assert loaded_data[4:] == ["model", "records"]


def test_uncharged_request_frees_no_cached_records(site: Any) -> None:
    """The time to free records reveals their number, and no schedule delays such an answer."""
    site.update()
    work = site.real._warm[1]
    model, examples = weakref.ref(work.shared.model), weakref.ref(work.examples)
    del work
    shapeless = Adapter({"other": np.zeros(1, np.float32)})  # so that a round is prepared but not charged
    assert site.refusal(make_letters(seed=5), adapter=shapeless) is Reason.ADAPTER_SHAPE
    gc.collect()
    assert model() is None, "two models would fill the memory"
    assert site.real._warm[1].records.training
    assert examples()
    site.update(round=2)
    gc.collect()
    assert examples() is None


@pytest.mark.by_day("machine0")
@pytest.mark.parametrize("machine", [{"micro_batch_tokens": 64}, {"kept_states_mib": 0}])
def test_changed_machine_settings_reload_the_model(site: Any, loaded_data: list[str], machine: Any) -> None:
    site.update()
    site.edit(machine=machine)
    site.update(round=2)
    assert loaded_data == ["model", "records"] * 2


def test_policy_change_applies_to_the_next_request(site: Any) -> None:
    site.update()
    site.edit(limits={"max_rounds": 1})
    assert site.refusal(round=2) is Reason.MAX_ROUNDS
    site.edit(limits={"max_rounds": 3}, dataset={"columns": {"text": "kind", "label": "kind"}})
    # The label column becomes the text: other records, another update.
    changed = site.update(round=2)
    site.edit(dataset={"columns": {"text": "body", "label": "kind"}})
    assert Adapter(site.update(round=3).tensors).digest() != Adapter(changed.tensors).digest()


def find_largest_value(update: Update) -> float:
    return max(float(np.abs(value).max()) for value in update.tensors.values())


def test_tighter_adapter_bound_applies_to_the_next_request(station: Any) -> None:
    site = station(training={"learning_rate": 5.0})
    assert find_largest_value(site.update()) > 0.25
    site.edit(limits={"max_adapter_value": 0.25})
    assert find_largest_value(site.update(round=2)) <= 0.25


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_adapter_kind_follows_the_policy_and_its_value_bound(station: Any, kind: str) -> None:
    site = station(lora={"kind": kind}, training={"learning_rate": 5.0})
    start = Adapter.from_task_model(build_task_model(site.config.task_model()))
    site.edit(allow={"adapters": ("lora",)}, limits={"max_adapter_value": 0.25})
    assert site.refusal(adapter=start) is Reason.ADAPTERS
    site.edit(allow={"adapters": ("lora", kind)})
    assert site.refusal() is Reason.ADAPTER_SHAPE, "LoRA's own tensors"
    update = site.update(adapter=start)
    assert find_largest_value(update) <= 0.25
    assert Adapter(update.tensors).has_same_shapes(start)
    (run,) = site.ledger().history.runs.values()
    assert run.proposal.adapter == kind


def test_start_adapter_is_projected_into_the_value_bound(station: Any) -> None:
    site = station(model={"adapter_sha256": "cd" * 32}, training={"learning_rate": 1e-6})
    tuned = Adapter({name: np.full_like(value, 7.0) for name, value in site.first.tensors.items()})
    site.edit(limits={"max_adapter_value": 0.25})
    assert 0.17 < find_largest_value(site.update(adapter=tuned)) <= 0.25, "it must start from the given adapter"
    (run,) = site.ledger().history.runs.values()
    assert run.proposal.start_adapter == "cd" * 32


# Held-out records.

HELD_OUT = {"data": {"heldout_fraction": 0.5}}


def list_held_out_texts(site: Any, config: RunConfig, *, round: int = 1) -> set[str]:
    """List the texts of the records that the site excludes from training in a round."""
    site.update(config, round=round, adapter=LoadedModel(select_settings_for_sites(config)).initial_adapter)
    _, work = site.real._warm
    assert isinstance(work, SiteWork)
    texts = {record.fields["text"] for record in work.records.heldout}
    assert texts.isdisjoint(record.fields["text"] for record in work.records.training)
    assert 5 < len(texts) < 35
    return texts


@pytest.mark.nightly
def test_held_out_split_uses_a_secret_key_per_site(station: Any) -> None:
    north, south = station("north", **HELD_OUT), station("south", **HELD_OUT)
    assert north.data.read_bytes() == south.data.read_bytes()
    by_north, by_south = list_held_out_texts(north, north.config), list_held_out_texts(south, south.config)
    assert by_north != by_south
    for site, stored in ((north, by_north), (south, by_south)):
        records = site.real._warm[1].records
        key = SigningKey.load(site.folder / "site_key.pem").derive_secret("held-out split")
        by_key = split_heldout([*records.training, *records.heldout], fraction=0.5, key=key)[1]
        assert stored == {record.fields["text"] for record in by_key}, "the secret in its key file must decide"
    assert list_held_out_texts(north, make_letters(name="second", seed=7, **HELD_OUT)) == by_north, (
        "the lead's seed must not matter"
    )
    north.restart()
    assert list_held_out_texts(north, north.config, round=2) == by_north


@pytest.mark.by_day("after a restart")
@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "after a restart"])
def test_final_adapter_is_stored_and_can_be_scored(site: Any, restarted: bool) -> None:
    final = Adapter(site.update().tensors)
    if restarted:
        site.restart()
    assert site.end(final).charged_rounds == 1
    folder = Path(site.adapters / select_settings_for_sites(site.config).run_id())
    config = read_saved_config(folder)
    comparison = compare_runs({"tuned": (config, folder / "adapter")}, file=str(site.data))
    shared = RunModel(LoadedModel(config), config)
    data = LeadData.build(LeadRecords.read(str(site.data), config, key="data"), config, shared.tokenizer)
    after, before = shared.score(final, data), shared.score(shared.initial_adapter, data)
    assert {name: comparison.estimate("tuned", name).value for name in comparison.scores} == after
    assert {name: comparison.estimate("base", name).value for name in comparison.scores} == before


@pytest.mark.parametrize("policy", ["keep", "decline"])
@pytest.mark.parametrize("value", [None, np.inf], ids=["other shapes", "infinite values"])
def test_unfit_final_adapter_ends_the_run_unsigned(site: Any, policy: str, value: float | None) -> None:
    site.edit(final_adapter=policy)
    final = Adapter(site.update().tensors)
    strange = Adapter({"head.weight": np.ones((2, 2), np.float32)})
    if value is not None:
        strange = Adapter({name: np.full_like(array, value) for name, array in final.tensors.items()})
    receipt = site.end(strange)
    assert (receipt.ended, receipt.reply) == (True, "")
    assert not site.adapters.exists()
    assert site.end(final).reply == "", "only the first notice may count"


@pytest.mark.parametrize("lost", ["model", "data", "shapes"])
def test_end_of_a_run_needs_neither_model_nor_records(site: Any, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    site.edit(final_adapter="decline")
    final = Adapter(site.update().tensors)
    (run,) = site.ledger().history.runs
    site.restart()
    monkeypatch.setattr(real_site, "LoadedModel", Mock(side_effect=ConfigError("model.path", "bert", "is missing")))
    if lost == "data":
        site.data.unlink()
        (site.folder / "runs" / f"{run}.json").unlink()
    if lost == "shapes":
        (site.folder / "runs" / f"{run}.shapes").unlink()
    assert site.end(final).reply == ("" if lost == "shapes" else final.digest())
    assert site.ledger().history.runs[run].expires is None, "the reserve must be released"


def test_final_adapter_is_stored_without_the_batch_invariance_test(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    final = Adapter(site.update().tensors)
    site.restart()
    monkeypatch.setattr(LoadedModel, "_test_model", Mock(side_effect=AssertionError))
    assert site.end(final).reply == final.digest()
    assert len(list(site.adapters.iterdir())) == 1


def test_declined_or_unknown_final_adapter_is_not_stored(site: Any) -> None:
    assert site.end(site.first) is None
    site.edit(final_adapter="decline")
    final = Adapter(site.update().tensors)
    assert site.end(final) is not None
    assert not site.adapters.exists()


def test_unusable_row_counts_stay_in_the_site_log(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    with site.data.open("a", encoding="utf-8") as stream:
        stream.write(" ,invoice\n" * 10)
    site.update()
    (warning,) = [record for record in caplog.records if "a large share" in record.getMessage()]
    assert (warning.name, warning.levelname) == ("fedtune.sites.real_site", "WARNING")
    assert (warning.__dict__["rows"], warning.__dict__["left_out"], warning.__dict__["share"]) == (50, 10, 0.2)
