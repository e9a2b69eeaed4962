"""`RunConfig`: accepted values, serialization, and what its digest depends on."""

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.api.compose import compose_run
from fedtune.config import MAX_SEED, parse
from fedtune.privacy import events
from fedtune.spec import ConfigError

from .cli import snapshots
from .privacy.builders import lead_key

BASE: dict[str, Any] = compose_run(["experiment=debug", "name=x"]).to_json()


def change_base(**changes: Any) -> dict[str, Any]:
    """Return the base settings with `group__key` (or `key`) changed."""
    fields: dict[str, Any] = json.loads(json.dumps(BASE))
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (fields[group] if group else fields)[key] = value
    return fields


_numbers = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)
_names = st.from_regex(r"[abcXYZ019][abcXYZ019_-]{0,11}", fullmatch=True)
_settings = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.,=-]{0,20}[A-Za-z0-9_]", fullmatch=True),
        "seed": st.integers(0, MAX_SEED),
        "resume": st.none() | st.text(min_size=1),
        "privacy__epsilon": st.floats(min_value=1e-6, max_value=100.0),
        "privacy__delta": st.floats(1e-12, 1e-3),
        "privacy__max_grad_norm": _numbers,
        "privacy__sampling_rate": st.floats(1e-6, 1.0),
        "privacy__mechanism": st.sampled_from(["dp_sgd", "none"]),
        "training__learning_rate": _numbers,
        "training__head_learning_rate": st.none() | _numbers,
        "training__betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(list),
        "training__local_steps": st.integers(1, 100),
        "lora__layers": st.none() | st.lists(st.integers(-2, 1), min_size=1, unique=True),
        "lora__target_modules": st.just("all-linear") | st.lists(_names, min_size=1, unique=True),
        "data__declared_sizes": st.integers(1, 900) | st.lists(st.integers(1, 900), min_size=2, max_size=2),
        "federation__site_names": st.lists(_names, min_size=2, max_size=2, unique=True),
        "federation__algorithm": st.sampled_from(["fedavg", "fedprox", "fedadam", "fedavgm", "fedmedian"]),
        "runtime__num_threads": st.none() | st.integers(1, 64),
        "runtime__seeded_noise": st.booleans(),
        # The home of a nonexistent user (~0) is refused; tests of invalid settings cover it.
        "tracking__output_dir": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="~")).filter(
            str.strip
        ),
    },
)


@snapshots.parametrize_mistakes("mistakes-composed")
def test_mutually_exclusive_settings_are_refused(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(shlex.split(typed))
    snapshots.check_message("mistakes-composed", typed, str(caught.value))


@given(_settings)
@settings(max_examples=150, deadline=None)
def test_configuration_round_trips_through_json(changes: dict[str, Any]) -> None:
    config = parse(change_base(**changes))
    reparsed = parse(json.loads(json.dumps(config.to_json())))
    assert reparsed == config
    assert reparsed.digest() == config.digest()
    assert reparsed.run_id() == config.run_id()


_NO_RESULT_CHANGES = [
    {"privacy__records_per_user": 3},  # has no effect with record-level privacy
    *({"name": "other"}, {"resume": "runs/x"}, {"runtime__kind": "ray"}, {"runtime__device": "cpu"}),
    *({"runtime__num_devices": 2}, {"runtime__num_threads": 3}, {"runtime__micro_batch_tokens": 77}),
    *({"runtime__step_mib": 77}, {"runtime__gradient_checkpointing": True}, {"runtime__sites_dir": "sites"}),
    {"runtime__kind": "ray", "runtime__num_threads": 2, "runtime__ray_address": "auto", "runtime__sites_per_gpu": 2},
    *({"tracking__progress": False}, {"tracking__output_dir": "elsewhere"}, {"tracking__log_level": "debug"}),
    {"tracking__tracker": "wandb", "tracking__send_to": "https://tracker.example"},
]
_RESULT_CHANGES = [
    *({"seed": 1}, {"runtime__seeded_noise": True}, {"privacy__epsilon": 7.9}, {"privacy__delta": 1e-6}),
    *({"privacy__mechanism": "none"}, {"privacy__noise_multiplier": 5.0}, {"privacy__max_grad_norm": 0.9}),
    *({"privacy__sampling_rate": 0.19}, {"training__learning_rate": 0.02}, {"training__local_steps": 3}),
    *({"federation__num_rounds": 3}, {"federation__spare_rounds": 1}, {"federation__min_sites": 2}),
    *({"federation__algorithm": "fedmedian"}, {"federation__participants": ["site-1"]}, {"data__declared_sizes": 229}),
    *({"data__train_fraction": 0.06}, {"data__test_file": None}, {"model__path": "random:llama"}, {"lora__rank": 5}),
    *({"lora__kind": "dora"}, {"lora__alternate": True}, {"head__scale": 11.0}, {"evaluation__max_new_tokens": 33}),
    *({"federation__if_over_budget": "fewer_rounds"}, {"federation__early_stopping_patience": 2}),
    {"federation__checkpoint_selection": "best"},
]


@pytest.mark.parametrize("changes", [*_NO_RESULT_CHANGES, *_RESULT_CHANGES], ids=str)
def test_digest_covers_exactly_the_settings_that_affect_results(changes: dict[str, Any]) -> None:
    assert parse(change_base(**changes)) != parse(BASE)
    assert (parse(change_base(**changes)).digest() != parse(BASE).digest()) == (changes in _RESULT_CHANGES)


def test_required_settings_are_enforced_and_configurations_immutable() -> None:
    for key in ("name", "task", "model", "data"):
        with pytest.raises(ConfigError, match=f"^{key}: is required"):
            parse({name: value for name, value in BASE.items() if name != key})
    with pytest.raises(AttributeError):
        parse(BASE).seed = 2  # type: ignore[misc]
    ids = {parse(change_base(**changes)).run_id() for changes in ({}, {"name": "y"}, {"seed": 1})}
    assert len(ids) == 3, "a change of name or configuration must change the run id"
    assert parse(change_base(runtime__num_threads=2)).run_id() in ids


def test_plan_uses_the_configured_values() -> None:
    # Fixed noise must suffice for all runs that share the epsilon.
    fixed = {"privacy__noise_multiplier": 0.9, "privacy__epsilon": 8.0}
    with pytest.raises(ConfigError, match=r"noise_multiplier = 0\.9: results in epsilon .* over 24 steps"):
        parse(change_base(**fixed, privacy__planned_runs=6))
    settings = change_base(privacy__noise_multiplier=4.0, federation__spare_rounds=2, training__local_steps=3)
    plan = parse(settings).plan()
    assert (plan.noise_multiplier, plan.local_steps, plan.num_rounds, plan.spare_rounds) == (4.0, 3, 2, 2)
    assert (plan.sampling_rate, plan.max_grad_norm, plan.delta, plan.unit) == (0.2, 1.0, 1e-5, "record")
    assert parse(change_base(privacy__mechanism="none")).plan().noise_multiplier == 0


NOISED = {"privacy__metrics": "noised", "data__heldout_fraction": 0.2}


def test_held_out_scores_are_planned_only_on_request() -> None:
    noise = {"privacy__noise_multiplier": 4.0}
    plain = parse(change_base(**noise)).plan()
    assert not plain.releases_metrics
    assert plain.event(rounds=2) == events.build_dp_sgd_event(sampling_rate=0.2, noise_multiplier=4.0, steps=4)
    assert parse(change_base(**noise, privacy__metrics_noise_multiplier=5.0)).plan().digest() == plain.digest()
    measured = parse(change_base(**noise, **NOISED, privacy__metrics_noise_multiplier=5.0)).plan()
    assert measured.metrics_noise_multiplier == 5.0
    assert measured.digest() != plain.digest()
    assert replace(measured, metrics_noise_multiplier=0.0) == plain


def test_calibrated_noise_accounts_for_released_scores() -> None:
    plan = parse(change_base(**NOISED, privacy__metrics_noise_multiplier=3.0)).plan()
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(plan.noise_multiplier)), 4)
    accountant.compose(dp_event.GaussianDpEvent(3.0), 2)
    assert 7.9 < accountant.get_epsilon(1e-5) <= 8.0
    # Fixed noise must cover released scores, too.
    assert parse(change_base(privacy__noise_multiplier=0.7)).privacy.noise_multiplier == 0.7
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier = 0\.7: results in epsilon .*, above privacy"):
        parse(change_base(privacy__noise_multiplier=0.7, **NOISED, privacy__metrics_noise_multiplier=1.0))


def test_proposal_contains_every_value_that_a_policy_checks() -> None:
    config = parse(change_base(privacy__noise_multiplier=4.0, federation__participants=["site-1"]))
    proposal = config.proposal(lead=lead_key.public, plan=config.plan())
    assert (proposal.run, proposal.lead, proposal.dataset) == (config.run_id(), lead_key.public, "banking77")
    assert (proposal.task, proposal.rank, proposal.target_modules) == ("classification", 4, ("all-linear",))
    assert (proposal.train_head, proposal.seeded_noise, proposal.num_sites) == (True, False, 1)
    assert proposal.base_model == "unverified"
    verified = parse(change_base(privacy__noise_multiplier=4.0, lora__target_modules=["query", "value"]))
    assert verified.proposal(lead=lead_key.public, plan=config.plan()).target_modules == ("query", "value")
    for kind, rank, scale in (("lora", 4, 2.0), ("dora", 4, 2.0), ("ia3", 1, 1.0)):
        named = parse(change_base(lora__kind=kind)).proposal(lead=lead_key.public, plan=config.plan())
        assert (named.adapter, named.rank, named.lora_scale) == (kind, rank, scale)


def test_declared_sizes_follow_participants_and_limit_delta() -> None:
    three = {"federation__num_sites": 3, "data__declared_sizes": [10, 20, 30]}
    assert parse(change_base(**three)).declared_sizes() == {"site-1": 10, "site-2": 20, "site-3": 30}
    part = parse(change_base(**three, federation__participants=["site-3", "site-1"]))
    assert part.declared_sizes() == {"site-1": 10, "site-3": 30}
    sizes = {"data__declared_sizes": [10, 200]}
    assert parse(change_base(**sizes, privacy__delta=0.00499)).privacy.delta == 0.00499
    with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.005: must be below .* = 0\.005"):
        parse(change_base(**sizes, privacy__delta=0.005))
    assert parse(change_base(**sizes, privacy__delta=0.005, privacy__mechanism="none")).privacy.delta == 0.005


@snapshots.parametrize_mistakes("mistakes-parsed")
def test_first_invalid_setting_is_named_with_key_and_value(typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(change_base(**json.loads(typed)))
    snapshots.check_message("mistakes-parsed", typed, str(error.value))


def test_automatic_dtype_is_kept_only_for_simulations() -> None:
    base = ["experiment=debug", "model.dtype=auto"]
    assert compose_run(base).model.dtype == "auto"
    assert compose_run(base, for_real_sites=True).model.dtype == "float32"
    assert compose_run([*base, "runtime=deployment"]).model.dtype == "float32", "each site has its own machine"
    assert compose_run([*base, "runtime=ray"]).model.dtype == "float32", "each node may be a different machine"
    assert compose_run([*base, "runtime.seeded_noise=true"]).model.dtype == "float32", "seeded runs must be portable"


def test_number_format_replaces_only_auto() -> None:
    assert compose_run(["experiment=debug", "model.dtype=auto"]).with_number_format("mixed").model.dtype == "mixed"
    assert compose_run(["experiment=debug"]).with_number_format("mixed").model.dtype == "float32"
