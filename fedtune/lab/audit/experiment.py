"""Privacy audits of simulated runs: training with canaries, an attack, and lower bounds on epsilon in `audit.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedtune.api.compose import Recipe, Settings, compose_recipe
from fedtune.api.public import CallbackListener, Progress, Run, load, run_in_folder
from fedtune.config import RunConfig, parse
from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound, compute_max_lower_bound
from fedtune.evaluation.fdp_bound import compute_fdp_lower_bound
from fedtune.federation.lead import LeadState
from fedtune.federation.run_folder import RunFolder
from fedtune.flower.simulation import simulate
from fedtune.formatting import convert_none_to_infinite
from fedtune.lab.audit.gradient_attack import GradientAttack
from fedtune.lab.audit.guesses import Place
from fedtune.lab.audit.record_attack import RecordAttack
from fedtune.lab.audit.spec import AuditSpec, require_guarantee
from fedtune.model.adapter import Adapter
from fedtune.privacy.durable import write_durably
from fedtune.privacy.policy_file import write_policy
from fedtune.report.derive.verdicts import list_refuted_bounds, read_audit
from fedtune.report.facts import Audit, AuditBound
from fedtune.runs.federation_run import Listener, UpdatingListener
from fedtune.runs.results import RunResult
from fedtune.runs.run_paths import find_run_folder
from fedtune.sites.virtual_site import POLICY, Participants, fix_number_format, generate_policy
from fedtune.spec import RUN_SCHEMA, ConfigError

_LARGEST_ADAPTER = 1e6
"""Limit on the adapter's norm during an audit: canaries move the adapter further than records, and unclipped canaries
a thousand times further."""
_MARK = """\
This folder contains an audit. The training data contained {what},
which were planted on purpose, and the adapter has learned from them. Do not use it; train again without an audit.
"""


def audit(
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    *,
    attack: Mapping[str, Any] = MappingProxyType({}),
    progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Run, Audit]:
    """Simulate a federation with canaries, attack it, and compute lower bounds on its epsilon.

    Args:
        recipe: the experiment, as for `simulate`.
        settings: overrides by dotted key, as for `simulate`.
        attack: fields of `fedtune.lab.audit.spec.AuditSpec` by name, such as `{"canaries": 200}`.
        progress: callback for progress.

    Returns:
        The run, and the audit with its lower bounds.

    Raises:
        ValueError: a setting is invalid, or the run cannot be audited.
        RunError: too few sites replied.
    """
    spec = AuditSpec.from_mapping(attack)
    config = make_auditable(compose_recipe(recipe, settings), spec)
    folder = find_run_folder(config)
    config = fix_number_format(config, folder)
    run_in_folder(config, folder, CallbackListener(config, progress), work=partial(run_audit, spec=spec))
    found = read_audit(folder)
    assert found is not None, "a finished audit writes audit.json"
    return load(folder), found


def make_auditable(config: RunConfig, spec: AuditSpec) -> RunConfig:
    """Return the configuration of the audited run: `config`, with held-out records if the attack needs them.

    Raises:
        ConfigError: the run has no privacy guarantee, or cannot be audited.
    """
    if spec.kind == "sensitivity":
        raise ConfigError("audit.kind", spec.kind, "does not train a run: use fedtune audit audit.kind=sensitivity")
    runtime, patience = config.runtime, config.federation.early_stopping_patience
    for key, given, only, why in (
        ("runtime.sites_dir", runtime.sites_dir, None, "plants artificial records, and must not charge a real ledger"),
        ("runtime", runtime.kind, "simulation", "plants artificial records"),
        ("runtime.num_devices", runtime.devices, 1, "observes each step in one process"),
        *(() if spec.kind == "records" else _list_gradient_requirements(config)),
        ("resume", config.resume, None, "always starts from the beginning, with its own random draws"),
        ("federation.early_stopping_patience", patience, None, "attacks all rounds of the plan"),
    ):
        if given != only:
            wanted = only if isinstance(only, str) else json.dumps(only)
            raise ConfigError(key, given, f"must be {wanted}: an audit {why}")
    require_guarantee(config)
    if config.privacy.unit != "record" and spec.kind == "records":
        bound = "must be 'record' with audit.kind=records: use audit.kind=gradient for canary users"
        raise ConfigError("privacy.unit", config.privacy.unit, bound)
    for site in list_audited_sites(config, spec):
        if site not in config.federation.active:
            raise ConfigError("audit.sites", site, f"must be one of {', '.join(config.federation.active)}")
    settings = config.to_json()
    settings["runtime"]["num_devices"] = 1
    settings["training"]["ignore_weak_signal"] = True  # the model's quality is irrelevant
    if spec.kind != "gradient" and config.data.heldout_fraction == 0:
        settings["data"]["heldout_fraction"] = spec.non_members
    return parse(settings)


def _list_gradient_requirements(config: RunConfig) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (setting, its value, the only value that supports canary gradients, the reason), where these differ.

    Canary records need none of them, because they are attacked through the scores of the sent adapters.
    """
    why = "with canary gradients observes all tensors in each step, without corrections; use audit.kind=records"
    yield "lora.alternate", config.lora.alternate, False, why
    yield "federation.ranks", list(config.federation.ranks), [], why
    if config.federation.bound_algorithm.has_site_half:
        yield "federation.algorithm", config.federation.algorithm, "fedavg", why


def list_audited_sites(config: RunConfig, spec: AuditSpec) -> tuple[str, ...]:
    """List the sites with canaries."""
    return spec.sites or tuple(config.federation.active)


def run_audit(config: RunConfig, folder: Path, listener: Listener, *, spec: AuditSpec) -> RunResult:
    """Execute and attack the run `config` from `make_auditable`, and write the run folder with `audit.json`.

    Raises:
        ConfigError: the canaries do not fit the model, or as for `simulate`.
        RunError: as for `simulate`.
    """
    sites = list_audited_sites(config, spec)
    everyone = Participants(config, folder, progress=listener.on_preparing)
    for site in config.federation.active:  # no limit: missing clipping must appear in the bound
        policy = generate_policy(config, everyone.sites.plan, site, lead=everyone.sites.lead_key().public)
        limits = replace(policy.limits, max_adapter_value=_LARGEST_ADAPTER)
        write_policy(replace(policy, limits=limits), everyone.sites.folder / site / POLICY)
    attack = (GradientAttack if spec.kind == "gradient" else RecordAttack)(everyone, spec, sites)
    kind = "records" if spec.kind == "records" else "users" if config.privacy.unit == "user" else "gradients"
    planted = f"about {spec.canaries // 2} artificial {kind} at each of {', '.join(sites)}"
    adapters: list[Adapter] = []

    def note(state: LeadState) -> None:
        if not adapters:  # before training begins
            write_durably(RunFolder(folder).audit_mark, _MARK.format(what=planted).encode())
        adapters.append(state.adapter)

    with attack.observe_steps():
        run = simulate(config, folder, UpdatingListener(listener, note), everyone=everyone)
    counts = attack.count_guesses(adapters)
    membership = attack.measure_membership_baselines() if isinstance(attack, RecordAttack) else ()
    # The charged epsilon of each audited site, and for the average the largest of them.
    claims: dict[Place, float] = {site: convert_none_to_infinite(run.privacy.sites[site].epsilon) for site in sites}
    claims[None] = max(claims.values())
    known = {"delta": config.privacy.delta, "confidence": spec.confidence}
    bounds = tuple(
        AuditBound(
            site=place,
            claimed_epsilon=claims[place],
            lower_bound=compute_epsilon_lower_bound(canaries, guesses, right, **known),
            best_possible=compute_max_lower_bound(canaries, guesses=guesses, **known),
            canaries=canaries,
            guesses=guesses,
            correct=right,
            fdp_bound=compute_fdp_lower_bound(canaries, guesses, right, **known),
        )
        for place, (canaries, guesses, right) in counts.items()
    )
    found = Audit(
        method="gradient_canaries" if spec.kind == "gradient" else "record_canaries",
        confidence=spec.confidence,
        delta=config.privacy.delta,
        seeded=config.runtime.seeded_noise,
        bounds=bounds,
        membership=membership,
        exceeded=False,
    )
    fields = {**asdict(replace(found, exceeded=bool(list_refuted_bounds(found)))), "schema_version": RUN_SCHEMA}
    write_durably(RunFolder(folder).audit, json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n")
    return run
