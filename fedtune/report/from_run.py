"""The source data of a run's report, read from the lead's run folder and from the reports that sites chose to release.

A run that crashed, was killed or is still in progress has no `run.json`, or a `run.json` without final scores. In that
case the newest checkpoint shows which sites took part in each round, and which receipts arrived.

A site may sign a report of its own ledger and send it to the lead. The run's report includes an excerpt of it, which is
as trustworthy as the site's signature. The site's report is verified before the excerpt is taken, because the lifetime
figures cannot be recomputed from the excerpt alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedtune.codec import read_bounded_file, reject_duplicate_keys
from fedtune.config import RunConfig, parse, read_saved_settings
from fedtune.federation.drift import HeldOut, pool_held_out_scores
from fedtune.federation.lead import Checkpoints, LeadState, RoundResult, find_invalid_field
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import convert_infinite_to_none
from fedtune.model.adapter_files import hash_adapter_files
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.release import Receipt
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import Selection
from fedtune.report import signing
from fedtune.report.attacks import read_findings
from fedtune.report.derive import dpia_fields
from fedtune.report.derive.ledger_figures import count_charges
from fedtune.report.derive.verdicts import read_audit
from fedtune.report.facts import NOT_RECORDED, LedgerFacts, Provenance, RunFacts, SiteFacts, SiteStatement, StartAdapter
from fedtune.report.group_scores import read_group_scores
from fedtune.report.model import Report
from fedtune.report.verify_report import derive_report, problems
from fedtune.runs.environment import Environment, read_environments, read_selection
from fedtune.runs.lineage import UNKNOWN, sum_start_losses
from fedtune.runs.results import FinalResult, RunResult, drop_infinite_scores
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.spec import RUN_SCHEMA, ConfigError, RunError, check_schema, name_file_in_errors

_RESULT = TypeAdapter(RunResult)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of a run folder: configuration, plan, results, newest checkpoint and recorded environments."""

    folder: Path
    config: RunConfig
    plan: Plan
    config_sha256: str  # digest of the run's configuration from `run.json`, or of config.yaml without `run.json`
    result: RunResult | None  # content of `run.json`
    state: LeadState | None  # newest checkpoint
    rounds: Sequence[RoundResult]  # finished rounds
    environments: tuple[Environment, ...]
    selection: Selection | None = None

    @property
    def adapter_digest(self) -> str:
        """Digest of the final adapter in `run.json`; "" for a run that has not finished."""
        return (self.result.adapter_digest or "") if self.result else ""

    @cached_property
    def receipts(self) -> Mapping[str, Receipt]:
        """Site -> its newest valid receipt; a receipt that the site did not sign for this run and plan is omitted."""
        stored = (self.state.receipts if self.state else {}).items()
        return {
            site: one for site, one in stored if not find_invalid_field(one, site=site, run=self.run, plan=self.plan)
        }

    @cached_property
    def sent(self) -> RunConfig | None:
        """The settings that real sites received; None for a simulation, or if they cannot be reconstructed."""
        config, sha256 = self.config, self.model_sha256
        if not self.deployed or config.digest() != self.config_sha256 or sha256 is None:
            return None
        return collect_sent_settings(config, self.plan, model_sha256=sha256)

    @property
    def model_sha256(self) -> str | None:
        """Hash of the base model in the settings, or as loaded; at real sites the run's name contains it."""
        return self.config.model.sha256 or next((one.model_sha256 for one in reversed(self.environments)), None)

    @cached_property
    def run(self) -> str:
        """The run's name in the sites' ledgers; without sent settings or valid receipts, the name in the run's
        configuration.
        """
        if not self.deployed:
            return f"{self.config.name}-{self.config_sha256[:32]}"
        if self.sent is not None:
            return self.sent.run_id()
        # The sent settings cannot be reconstructed, but a valid receipt contains the run's name with their digest.
        form = re.compile(re.escape(self.config.name) + "-[0-9a-f]{32}")
        for site, receipt in (self.state.receipts if self.state else {}).items():
            if receipt.site == site and form.fullmatch(receipt.run) and receipt.has_valid_signature():
                return receipt.run
        return self.config.name

    @property
    def deployed(self) -> bool:
        return self.config.runtime.kind == "deployment"


def collect_sent_settings(config: RunConfig, plan: Plan, *, model_sha256: str) -> RunConfig:
    """Return the settings as sent to real sites, with the plan's noise multiplier, so that it is not recalibrated."""
    noise = plan.noise_multiplier if plan.private else config.privacy.noise_multiplier
    privacy = replace(config.privacy, noise_multiplier=noise)
    return select_settings_for_sites(replace(config, model=replace(config.model, sha256=model_sha256), privacy=privacy))


def read_run(folder: Path, *, plan: Plan | None = None) -> RunRecord:
    """Read the record of a run from its folder.

    If the `plan` from an earlier call for the same folder is passed, a noise multiplier that `run.json` does not
    contain is not calibrated again.

    Raises:
        ConfigError: the folder is not a run folder, or mixes several runs.
        RunError: a file is damaged.
    """
    files, settings = RunFolder(folder), read_saved_settings(folder)
    with name_file_in_errors(files.config):
        config = parse(settings)
    result = _read_result(folder)
    digest = result.config_sha256 if result else config.digest()
    if not files.saved_checkpoints and result is None:
        raise ConfigError("run folder", str(folder), "has no checkpoint: the run has not started")
    state = Checkpoints(files.checkpoints, digest).load() if files.saved_checkpoints else None
    return RunRecord(
        folder=folder,
        config=config,
        plan=plan or _reconstruct_plan(folder, config, result),
        config_sha256=digest,
        result=result,
        state=state,
        # After a checkpoint was restored to an earlier round, only run.json contains the later rounds.
        rounds=max(state.rounds if state else (), result.rounds if result else (), key=len),
        environments=read_environments(folder),
        selection=read_selection(folder),
    )


def _allows_inexact_gradients(folder: Path, config: RunConfig) -> bool | None:
    """Whether all simulated sites' policies allow gradients with batch-dependent rounding; None: a policy is not
    available.
    """
    if config.runtime.kind == "deployment":
        return None
    sites = RunFolder(folder).locate_sites(config.runtime.sites_dir)
    policies = [sites / name / "site.toml" for name in config.federation.active]
    with suppress(ConfigError):
        accepted = [read_policy(policy).allow.inexact_gradients for policy in policies]  # a missing policy raises
        return all(accepted)
    return None


def _read_result(folder: Path) -> RunResult | None:
    """Read and strictly validate `run.json`, because the folder may come from an untrusted source."""
    path = RunFolder(folder).result
    if not path.is_file():
        return None
    try:
        data = read_bounded_file(path, key="result")
        fields = json.loads(data, object_pairs_hook=reject_duplicate_keys)
        check_schema(f"{path}: schema_version", fields["schema_version"], RUN_SCHEMA, of="run folder")
        result = _RESULT.validate_json(data, strict=True)
        json.dumps(asdict(result), allow_nan=False)  # a ValueError for a number that is not finite
        if not result.privacy.sites:
            raise ValueError("privacy.sites")
    except ConfigError:
        raise
    except (ValueError, TypeError, LookupError, ValidationError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is not a run.json of fedtune") from error
    return result


def _reconstruct_plan(folder: Path, config: RunConfig, result: RunResult | None) -> Plan:
    """Return the run's plan with the noise multiplier from `run.json`, because recalibration takes about a second."""
    if result is None:
        return config.plan()
    privacy = result.privacy
    spent = next(iter(privacy.sites.values()))
    plan = replace(config, privacy=replace(config.privacy, noise_multiplier=spent.noise_multiplier or None)).plan()
    for key, value, noted in (
        ("privacy.unit", plan.unit, privacy.unit),
        ("privacy.delta", plan.delta, privacy.delta),
        ("privacy.noise_multiplier", plan.noise_multiplier, spent.noise_multiplier),
        ("privacy.sampling_rate", plan.sampling_rate, spent.sampling_rate),
        ("privacy.metrics_noise_multiplier", plan.metrics_noise_multiplier, spent.metrics_noise_multiplier),
        ("training.local_steps", plan.local_steps * spent.rounds, spent.steps),
        ("federation.participants", sorted(config.federation.active), sorted(privacy.sites)),
    ):
        if value != noted:
            bound = f"does not match run.json, which has {noted}"
            raise ConfigError(key, value, bound).in_file(RunFolder(folder).config)
    return plan


def build_run_report(folder: Path, *, site_reports: Sequence[Report] = ()) -> Report:
    """Build the report of the finished or unfinished run in `folder`.

    `site_reports` are used in addition to the reports in the folder `site_reports/`. If the folder contains the same
    report with a valid signature, the signature is kept.

    Raises:
        ConfigError: the folder is not a run folder, its files belong to different runs, or a site report belongs to
            another run.
        RunError: a file is damaged.
    """
    record = read_run(folder)
    released = [signing.read_report(str(path))[1] for path in sorted(RunFolder(folder).site_reports.glob("*.json"))]
    own = check_site_reports(record, [*released, *site_reports])
    report = derive_report(collect_run_facts(folder, record, own=own))
    with suppress(ConfigError, RunError):
        signed = signing.read_report(str(folder))[1]
        signing.verify_report_signature(signed)
        if signing.encode_canonical_bytes(signed) == signing.encode_canonical_bytes(report):
            return signed
    return report


def collect_run_facts(folder: Path, record: RunRecord, *, own: Mapping[str, Report]) -> RunFacts:
    """Collect the report data of a run, finished or not; `own` maps each site to its verified report.

    The results of an audit and of attacks in the folder are included.

    Raises:
        RunError: the file of an audit or of attacks is damaged, or the audit belongs to another run.
    """
    config, plan, state = record.config, record.plan, record.state
    audit, noted = read_audit(folder), record.environments[-1] if record.environments else None
    if audit is not None and audit.delta != plan.delta:
        raise RunError(f"{RunFolder(folder).audit} belongs to another run: its delta is {audit.delta:g}")
    final = record.result.final if record.result else FinalResult(metrics={})
    times = [one.ended for one in record.rounds] + [one.since for one in record.environments]
    facts = RunFacts(
        kind="run",
        run=record.run,
        sent=json.dumps(record.sent.decisive(), sort_keys=True) if record.sent else "",
        plan=plan,
        **dpia_fields.derive_facts_from_settings(config, plan),
        seeded_noise=config.runtime.seeded_noise or bool(record.result and record.result.privacy.seeded_noise),
        date=max(times, default=None),
        sampling=noted.sampling if noted else None,
        randomness=noted.randomness if noted else None,
        inexact_gradients=_allows_inexact_gradients(folder, config),
        config_file_sha256=config.digest(),
        trained_parameters=state.adapter.num_values if state else None,
        total_parameters=noted.total_parameters if noted else None,
        group_scores=_find_group_scores(record),
        provenance=_build_provenance(record),
        # A report does not include the noised scores of single sites.
        rounds=tuple(
            replace(one, site_scores={}, metrics=drop_infinite_scores(one.metrics), failed_sites=dict(one.failed_sites))
            for one in record.rounds
        ),
        before=drop_infinite_scores(state.metrics_before if state else final.metrics_before),
        final=drop_infinite_scores(final.metrics),
        constant=convert_infinite_to_none(final.constant),
        seconds=final.seconds,
        findings=final.findings,
        energy=final.energy,
        detail=final.detail,
        selection=record.selection,
        audit=audit,
        canaries_planted=RunFolder(folder).audit_mark.exists() or bool(audit and audit.bounds),
        held_out=_collect_held_out(record),
        sites=tuple(
            SiteFacts(
                site=site,
                declared_size=config.declared_sizes()[site],
                receipt=record.receipts.get(site),
                statement=extract_statement(own[site], run=record.run, plan=plan) if site in own else None,
            )
            for site in config.federation.active
        ),
        files={},
    )
    if facts.finished:
        facts = replace(facts, files=hash_model_files(folder))
    return replace(facts, attacks=read_findings(folder, facts.adapter_digest))


def _find_group_scores(record: RunRecord) -> Mapping[str, float | None]:
    """Return the scores of the run's model by group from the output of `fedtune compare --by`; {} without such a file.

    The scores are read from groups.json in the run's folder, or from compare.json in its parent folder. A comparison
    without this model is ignored.
    """
    of_run = {"adapter_digest": record.adapter_digest, "primary_metric": record.config.primary_metric}
    for path in (record.folder / "groups.json", record.folder.parent / "compare.json"):
        with suppress(ConfigError):
            if found := read_group_scores(path, **of_run):
                return {f"{one.column}: {one.name}": one.score for one in found}
    return {}


def _collect_held_out(record: RunRecord) -> tuple[HeldOut, ...] | None:
    """Return the held-out scores of the run's predecessors, from the previous run's report, followed by the run's own
    scores.

    None for a run without a start adapter, and for a run without noised scores.
    """
    config, plan, start = record.config, record.plan, record.config.model.adapter
    if start is None or not plan.releases_metrics:
        return None
    sizes = {site: size * config.data.heldout_fraction for site, size in config.declared_sizes().items()}
    own = pool_held_out_scores(record.rounds, sizes, noise=plan.metrics_noise_multiplier, run=config.name)
    before: tuple[HeldOut, ...] = ()
    for folder in (Path(start), Path(start).parent):
        with suppress(ConfigError):  # without a readable report, the history starts with this run
            facts = signing.parse_report(read_bounded_file(folder / "report.json", key="report")).facts
            before = (facts.held_out or ()) if isinstance(facts, RunFacts) else ()
    return (*before, *((own,) if own else ())) or None


def hash_model_files(folder: Path) -> Mapping[str, str]:
    """Return the SHA-256 of each file of a run's finished model, and of each export that the run folder records."""
    run = RunFolder(folder)
    # An export may not claim a name in the run's own folder.
    exports = {
        name: digest for name, digest in run.read_exports().items() if not name.startswith(f"{run.adapter.name}/")
    }
    return hash_adapter_files(run.adapter) | exports


def extract_statement(report: Report, *, run: str, plan: Plan) -> SiteStatement:
    """Extract the parts of a site's own report that a run's report includes."""
    (own,), facts = report.sites, report.facts
    assert isinstance(facts, LedgerFacts)
    assert own.lifetime is not None
    known = next((one for one in facts.runs if one.run == run), None)  # None: the site refused the run
    same_plan = known is None or (  # the split into planned and spare rounds makes no difference
        known.plan.max_rounds == plan.max_rounds
        and replace(known.plan, num_rounds=plan.num_rounds, spare_rounds=plan.spare_rounds) == plan
    )
    return SiteStatement(
        date=facts.date[:10],
        same_plan=same_plan,
        verdict=own.verdict,
        approved=facts.approved,
        lifetime=own.lifetime,
        charges=count_charges(facts),
        verification=facts.verification,
        releases=tuple(release for release in facts.releases if release.run == run),
        asserted=facts.asserted,
    )


def check_site_reports(record: RunRecord, reports: Iterable[Report]) -> Mapping[str, Report]:
    """Check the sites' reports and return them by site.

    Guarantee: each report is signed with the key that signed the site's receipts in this run. Its ledger contains the
    run, unless the receipt charges no round. Its figures follow from its own events, and it is no older than the run's
    newest receipt; only the site knows whether a newer report exists.

    Raises:
        ConfigError: a report does not meet these conditions.
    """
    found: dict[str, Report] = {}
    for report in reports:
        facts, refused = report.facts, partial(ConfigError, "site report", report.facts.name)
        if not isinstance(facts, LedgerFacts):
            raise refused("is not a ledger's report: ask the site for fedtune report site.toml --sign")
        if (site := facts.site) not in (sites := record.config.federation.active):
            raise refused(f"is about {site}, which is not a site of this run ({', '.join(sites)})")
        if (receipt := record.receipts.get(site)) is None:
            raise refused(f"cannot be checked: this run has no receipt from {site}, so the site's key is unknown")
        try:
            key = signing.verify_report_signature(report)
        except RunError as error:
            raise refused(f"must be signed by its site: {error}") from None
        if key != receipt.site_key:
            by = f"is signed by {key}" if key else "is not signed"
            raise refused(f"{by}: must be signed by {receipt.site_key}, the key of {site}'s receipts")
        if receipt.charged_rounds and all(run.run != record.run for run in facts.runs):
            raise refused(f"is from a ledger without the run {record.run}: ask the site for a newer report")
        if facts.verification is not None and facts.verification.num_events < receipt.sequence:
            had = f"{facts.verification.num_events} events, and the run's receipt is of event {receipt.sequence}"
            raise refused(f"is older than this run: its ledger had {had}")
        if wrong := problems(report):
            first = wrong[0]
            raise refused(f"is inconsistent: {first.where} is {first.reported}, but should be {first.expected}")
        if found.setdefault(site, report) != report:
            raise refused(f"is a second report of {site}: pass only one report per site")
    return found


def _build_provenance(record: RunRecord) -> Provenance:
    config, environments = record.config, record.environments
    names = dict.fromkeys(name for environment in environments for name in environment.libraries)
    libraries = {
        name: _join_distinct(one.libraries[name] for one in environments if name in one.libraries) for name in names
    }
    version = _join_distinct(environment.fedtune_version for environment in environments)
    return Provenance(
        fedtune_version=version or (record.result.fedtune_version if record.result else "") or NOT_RECORDED,
        config_sha256=record.config_sha256,
        **dpia_fields.derive_provenance(config),
        model_sha256=_join_distinct(environment.model_sha256 for environment in environments) or config.model.sha256,
        libraries={name: version for name, version in libraries.items() if version},
        python=_join_distinct(environment.python for environment in environments),
        machine=_join_distinct(f"{one.system} {one.machine}, {one.device}" for one in environments),
        start_adapter=_read_start_adapter(record),
    )


def _read_start_adapter(record: RunRecord) -> StartAdapter | None:
    """Return the adapter from which the run started; a field of the wrong type counts as unknown, since files are
    untrusted.

    What a start adapter inherits is read from the settings, which sites sign.  That of a base model or of synthetic
    records is only stated.
    """
    made = record.state or (record.result and record.result.provenance)
    noted = made.start_adapter if made and isinstance(made.start_adapter, Mapping) else {}
    if not isinstance(digest := record.config.model.adapter_sha256 or noted.get("digest"), str):
        return None
    said = (noted.get(key) for key in ("from", "dataset", "unit"))
    run, dataset, unit = (one if isinstance(one, str) and one != UNKNOWN else None for one in said)
    public, own = record.config.public.train_file is not None, record.config.privacy
    if record.config.model.adapter_sha256:
        epsilon, delta, unit = own.start_epsilon, own.start_delta, own.start_unit
    else:
        (epsilon, delta), public = sum_start_losses(noted), public and noted.get("public") is True
    return StartAdapter(digest=digest, run=run, dataset=dataset, unit=unit, delta=delta, epsilon=epsilon, public=public)


def _join_distinct(values: Iterable[str]) -> str | None:
    """Return the single value that all parts of a run share, or the distinct values in order, joined with slashes."""
    return " / ".join(dict.fromkeys(values)) or None
