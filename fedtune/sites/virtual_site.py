"""Simulated participants in one process: virtual sites with records and ledgers, and the lead.

A simulated site has the same policy, key and ledger as a real site, so that a run that works on a laptop works at real
sites without changes. The generated `site.toml` allows exactly one run, and its lifetime cap is the cost of that run.
With `runtime.sites_dir`, the files persist across runs and can be edited like those of a real site.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fedtune.codec import read_regular_file
from fedtune.config import RunConfig, read_saved_config
from fedtune.federation.policy_dry_run import read_history
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.secure.at_site import Parties
from fedtune.federation.site_round import PreparedRun, Site
from fedtune.privacy import events, filter
from fedtune.privacy.dp_library import ComposedDpEvent, DpEvent
from fedtune.privacy.durable import lock_folder, write_durably
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import run_acceptance
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_files import SiteFiles, read_histories
from fedtune.privacy.site_policy import (
    DEFAULT_MIN_GRAD_NORM,
    SHARED_RANK_FACTOR,
    Allow,
    Budget,
    Dataset,
    Limits,
    Policy,
    Population,
    ReferenceRun,
    Releases,
)
from fedtune.privacy.trust import Trust
from fedtune.sites.run_cache import RunCache
from fedtune.sites.run_records import RunRecords
from fedtune.sites.shared_model import LoadedModel, Progress, RunModel, choose_num_devices, ignore_progress
from fedtune.sites.work import SiteWork, WorkingSite
from fedtune.spec import ConfigError, RefusedError, RunError, format_value
from fedtune.training.number_format import FLOAT32, MIXED, choose_number_format

LEAD_KEY = "lead_key.pem"
DEALT = "partition.json"
RECEIPTS = "receipts.json"  # newest receipts of persistent sites, returned by the lead's next run
POLICY = "site.toml"


@dataclass(frozen=True)
class VirtualSites:
    """The folder of simulated sites: `site.toml`, `site_key.pem` and `ledger.db` of each site, and the lead's key."""

    config: RunConfig  # configuration of the run
    folder: Path  # `runtime.sites_dir`, or `sites/` in the run folder.
    plan: Plan  # plan of the run

    @classmethod
    def create(cls, config: RunConfig, run_folder: Path, plan: Plan) -> VirtualSites:
        """Locate the folder of a run's simulated sites.

        Raises:
            ConfigError: `runtime.sites_dir` is not a folder, or lacks the sites of a renewed run.
        """
        kept = config.runtime.sites_dir
        if kept and os.path.lexists(kept) and not Path(kept).is_dir():
            raise ConfigError("runtime.sites_dir", kept, "must be a folder, or not exist yet")
        folder = RunFolder(run_folder).locate_sites(kept)
        if config.federation.renewal:
            before, ledgers = read_saved_config(Path(config.model.adapter or "")), read_histories(folder)
            # Other ledgers would not contain the charges of the previous runs.
            missing = sorted({*before.federation.active} - ledgers.keys())
            if missing or not any(before.run_id() in {*ledger.runs, *ledger.lost_runs} for ledger in ledgers.values()):
                lacks = f"no ledger of {missing[0]}" if missing else f"no ledger with the run {before.run_id()}"
                bound = f"must be the ledger folder of the renewed run: {lacks} in {folder.absolute()}"
                raise ConfigError("runtime.sites_dir", kept, bound)
        return cls(config, folder, plan)

    def check_partition(self) -> None:
        """Record the partition of records among persistent sites, or check that this run has the same partition.

        With another partition, a record could move to a site whose ledger does not contain the record's prior spending.

        Raises:
            ConfigError: a setting of the partition differs; names the first such setting.
            RunError: the recorded partition cannot be read, or is missing although there is a ledger.
        """
        path, dealt = self.folder / DEALT, select_partition_settings(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder):  # two runs may start at the same new sites
            if not path.exists() and not any(self.folder.glob("*/ledger.db")):
                write_durably(path, json.dumps(dealt, indent=1).encode() + b"\n")
        before = read_partition_settings(path, keys=dealt)
        for key, value in dealt.items():
            if before[key] != value:
                bound = f"must be {format_value(before[key])}, as in the existing partition in {self.folder}"
                raise ConfigError(key, value, bound)

    def lead_key(self) -> SigningKey:
        """Load or create the key of the simulated lead, which every generated policy allows."""
        return SigningKey.load_or_create(self.folder / LEAD_KEY)

    def files(self, site: str) -> SiteFiles:
        """Locate the files of a simulated site, and generate a missing policy.

        Raises:
            ConfigError: `site.toml` is not a policy, or belongs to another site.
        """
        path = self.folder / site / POLICY
        if not path.exists():
            write_policy(self._generate_policy(site), path)
        files = SiteFiles.from_site_toml(path)
        if files.policy.site != site:
            raise ConfigError("site", files.policy.site, f"must be {site}").in_file(path)
        return SiteFiles(replace(files.policy, simulated=True), path)

    def _generate_policy(self, site: str) -> Policy:
        return generate_policy(self.config, self.plan, site, lead=self.lead_key().public)

    def ledger(self, site: str) -> SiteLedger:
        """Open the ledger of a site under its current policy."""
        ledger = self.files(site).open_ledger(create=True)
        ledger.set_server_time(time.time())  # this machine is also the server
        return ledger

    def write_policies(self, *, within: Budget) -> None:
        """Write policies that allow only this run, under a budget that several runs share."""
        for site in self.config.federation.active:
            policy = self._generate_policy(site)
            budget = replace(within, max_epsilon_per_run=policy.budget.max_epsilon_per_run)
            write_policy(replace(policy, budget=budget), self.folder / site / POLICY)

    def check_policies_exist(self) -> None:
        """Check that every site has a policy.

        Raises:
            ConfigError: a policy is missing.
        """
        for site in self.config.federation.active:
            path = self.folder / site / POLICY
            if not path.is_file():
                bound = f"must contain the run's sites ({path} is missing); null creates new sites"
                raise ConfigError("runtime.sites_dir", str(self.folder), bound)

    def check_room(self, runs: Sequence[Proposal], *, asked: str, shapes: Sequence[Proposal] = ()) -> None:
        """Check that every site would accept all of these runs in sequence, without writing to a ledger.

        Args:
            runs: proposals of the runs; a run that is already in a ledger costs nothing more there.
            asked: command or study that starts these runs, as the beginning of the error message.
            shapes: examples of further proposals that the policies must also allow.

        Raises:
            RefusedError: names the site, and the broken rule or the number of runs that fit.
        """
        for site in self.config.federation.active:
            files = self.files(site)
            history, spent, does = read_history(files), Counter[DpEvent](), "refuses these trials"
            now = history.now()
            held = partial(history.count_remaining_charges, now)
            try:
                run_acceptance.require_usable_ledger(history)
                for run in (*shapes, *runs):
                    files.policy.check(run)
                for fit, run in enumerate(runs):
                    does = f"has budget for {fit} of these trials"
                    if run.run not in history.runs:
                        spent += events.count_mechanisms([run.plan.full_event])
                        run_acceptance.require_budget_room(
                            history, files.policy, run.plan.cohorts, asked=spent, held=held, now=now
                        )
            except Refused as refused:
                raise RefusedError(f"{asked}: site {site} {does}; nothing was started ({refused})") from None


def fix_number_format(
    config: RunConfig, run_folder: Path, *, alone: bool = False, told: Callable[[str], None] = lambda text: None
) -> RunConfig:
    """Replace `model.dtype=auto` with the fastest number format on this machine that every existing policy allows.

    A resumed run uses the format recorded in its folder. A run with an explicit format is returned unchanged. Policies
    of new sites allow whatever format is selected.

    Args:
        config: the run's configuration.
        run_folder: folder of the run.
        alone: as in `choose_num_devices`, which determines the number of threads.
        told: receives a sentence about the selected format.

    Raises:
        ConfigError: the base model or a policy cannot be read.
    """
    if config.model.dtype != "auto":
        return config
    if config.resume is not None:
        return config.with_number_format(read_saved_config(Path(config.resume)).model.dtype)
    sites = VirtualSites.create(config, run_folder, config.plan())
    existing = [site for site in config.federation.active if (sites.folder / site / POLICY).is_file()]
    formats = [set(sites.files(site).policy.allow.dtypes) for site in existing]
    allowed = {FLOAT32, MIXED}.intersection(*formats)
    runtime = choose_num_devices(config, alone=alone) if config.privacy.private else config.runtime
    chosen = choose_number_format(config.model, runtime, allowed=allowed, told=told)
    return config.with_number_format(chosen)


def fit_to_budgets(config: RunConfig, run_folder: Path) -> RunConfig:
    """Adapt a run to the sites' budgets with fewer rounds or more noise, depending on `if_over_budget`, and its ranks
    to the sites' policies.

    A site without any budget may refuse later, as long as `min_sites` other sites have enough.

    Raises:
        RefusedError: too few sites have enough budget.
    """
    if not (config.may_be_fitted or config.federation.ranks) or config.runtime.sites_dir is None:
        return config  # a new ledger always has room for its run
    sites = VirtualSites.create(config, run_folder, config.plan())
    sites.check_partition()
    proposal = config.proposal(lead=sites.lead_key().public, plan=sites.plan)
    offers: list[Offer] = []
    without: dict[str, str] = {}
    for site in config.federation.active:
        try:
            ledger = sites.ledger(site)
            offer = ledger.make_offer(proposal)
            if not config.can_use_offer(offer):
                ledger.require_acceptable(proposal)  # names the rule that the whole proposal breaks
                raise RunError("a site's budget changed while the run was being prepared: start the run again")
            offers.append(offer)
        except Refused as refused:
            without[site] = f"{refused.reason}, requested {refused.requested}, allowed {refused.allowed}"
        except RunError as error:
            without[site] = str(error)
    if len(offers) < config.federation.min_sites:
        raise RefusedError(config.federation.explain_too_few(len(offers), "have enough budget", others=without))
    return config.fit_to_offers(offers)


def generate_policy(config: RunConfig, plan: Plan, site: str, *, lead: str) -> Policy:
    """Generate a policy that allows only `plan`.

    Its lifetime cap is the cost of all planned runs by the Renyi filter, rounded up.
    """
    proposal = config.proposal(lead=lead, plan=plan)
    budget = build_covering_budget([plan] * plan.runs)
    trust = Trust()
    if (shared := plan.shared) is not None:  # all keys of simulated sites are in one folder
        trust = Trust(
            secure=True, min_sites=shared.num_sites, min_threshold=shared.threshold, colluders=shared.colluders
        )
    return Policy(
        site=site,
        population=Population(
            name=f"{site}-population", unit=plan.unit, arrivals=plan.cohorts.period if plan.cohorts else ""
        ),
        dataset=(Dataset(id=proposal.dataset, declared_size=config.declared_sizes()[site]),),
        budget=replace(budget, max_epsilon_per_run=config.privacy.epsilon if plan.private else None),
        limits=Limits(
            min_noise_multiplier=min(plan.noise_multipliers),
            max_sampling_rate=plan.sampling_rate,
            max_grad_norm=plan.max_grad_norm,
            min_grad_norm=min(DEFAULT_MIN_GRAD_NORM, plan.max_grad_norm),
            max_local_steps=plan.local_steps,
            max_rounds=plan.max_rounds,
            max_records_per_user=plan.records_per_user,
            max_lora_scale=max(proposal.lora_scale, 1.0),
            max_head_scale=max(proposal.head_scale, 1.0),
            # Training without clipping has unbounded adapters, and no guarantee.
            **({} if plan.private else {"max_adapter_value": 1e6}),
        ),
        allow=Allow(
            leads=(lead,),
            tasks=(proposal.task,),
            base_models=(proposal.base_model,),
            target_modules=proposal.target_modules,
            max_rank=max(proposal.find_rank(site) or proposal.rank, -(-proposal.rank // SHARED_RANK_FACTOR)),
            train_head=proposal.train_head,
            adapters=(proposal.adapter,),
            dtypes=(proposal.dtype,),
            seeded_noise=proposal.seeded_noise,
        ),
        # No padding: in a simulation there is nobody from whom to hide response times.
        releases=Releases(metrics="noised" if plan.releases_metrics else "none", reply_after_s=0.0),
        trust=trust,
        simulated=True,
    )


def build_covering_budget(plans: Sequence[Plan]) -> Budget:
    """Build a budget that covers one run of each plan, but not a second run of any plan.

    All plans must have the same delta, and either all or none are private.
    """
    first = plans[0]
    if not first.private:
        typical = ReferenceRun(sampling_rate=first.sampling_rate, noise_multiplier=1.0, steps=1)
        return Budget(delta=first.delta, max_epsilon=math.inf, reference=typical)
    steps = first.local_steps * first.max_rounds
    typical = ReferenceRun(sampling_rate=first.sampling_rate, noise_multiplier=first.accounted_noise, steps=steps)
    whole = ComposedDpEvent(tuple(plan.full_event for plan in plans))
    cheapest = min(plans, key=lambda plan: filter.find_smallest_cap(plan.full_event, delta=plan.delta)[0])
    cap = filter.find_tightest_cap(whole, more=cheapest.full_event, reference=typical.event, delta=first.delta)
    return Budget(delta=first.delta, max_epsilon=cap, reference=typical)


def select_partition_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine the partition of records among the sites, as a JSON object."""
    data, unit = config.data, config.privacy.unit
    partition = {
        "privacy.unit": unit,
        "seed": config.seed,
        "federation.num_sites": config.federation.num_sites,
        "federation.site_names": list(config.federation.names),
        "data.train_file": data.train_file,
        "data.partition": dataclasses.asdict(data.partition),
        "data.validation_fraction": data.validation_fraction,
        "data.test_fraction": data.test_fraction,
        # Records are partitioned by a hash of the fields that task and partition use, users by their ids.
        "data.columns": config.bound_task.columns(data, partition=True, unit=unit),
    }
    return dict(json.loads(json.dumps(partition)))


def read_partition_settings(path: Path, *, keys: Iterable[str]) -> dict[str, Any]:
    """Read the recorded partition settings of persistent sites.

    Raises:
        RunError: the file cannot be read, or lacks a setting in `keys`.
    """
    try:
        settings = json.loads(read_regular_file(path))
        return {key: settings[key] for key in keys}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        bound = (
            "restore the file, which shows which ledger of a simulation has charged which records; if the ledgers in "
        )
        bound += "this folder are of real sites, set runtime.sites_dir to another folder"
        raise RunError(f"{path} cannot be read ({type(error).__name__}); {bound}") from error


class Participants:
    """The participants of a simulation: sites with their own records and ledgers, and the lead; all share one model.

    Args:
        config: the run's configuration.
        folder: the run folder, which contains the ledgers unless `runtime.sites_dir` is set.
        progress: callback for slow steps, starting with the loading of the model.
        cache: cache for later runs; None: no cache.
    """

    def __init__(
        self, config: RunConfig, folder: Path, *, progress: Progress = ignore_progress, cache: RunCache | None = None
    ) -> None:
        self.config, self.plan = config, config.plan()  # the noise is calibrated once per process
        self._progress, self._cache = progress, cache
        self.sites = VirtualSites.create(config, folder, self.plan)
        self.records = RunRecords(config)
        self.parties = {name: Parties() for name in config.federation.active}

    @cached_property
    def identities(self) -> dict[str, str]:
        """Public key of each active site."""
        files = {name: self.sites.files(name) for name in self.config.federation.active}
        return {name: site_files.load_key(make=True).public for name, site_files in files.items()}

    @cached_property
    def shared(self) -> RunModel:
        """The model of all participants, loaded on first access."""
        policies = [self.sites.files(name).policy for name in self.config.federation.active]
        inexact = all(policy.allow.inexact_gradients for policy in policies)
        config, cache, progress = self.config, self._cache, self._progress
        alone = cache is not None
        load = partial(LoadedModel, config, inexact_allowed=inexact, leads=True, alone=alone, progress=progress)
        loaded = load() if cache is None else cache.reuse_or_load_model(config, inexact_allowed=inexact, load=load)
        return RunModel(loaded, config, records=self.records, progress=progress, cache=cache)

    @cached_property
    def work(self) -> dict[str, SiteWork]:
        """The records of each active site, with the shared model."""
        config, federation = self.config, self.config.federation
        sizes = config.declared_sizes()
        return {
            name: SiteWork(
                name,
                self.shared,
                of_site,
                declared_size=sizes[name],
                max_adapter_value=self.sites.files(name).policy.compute_adapter_bound(config.lora.scale),
            )
            for name, of_site in zip(federation.names, self.records.dealt.sites, strict=True)
            if name in federation.active
        }

    def list_changed_sites(self) -> list[str]:
        """List the sites whose records have changed since the newest committed round of this run."""
        return [name for name in self.work if self._has_changed(name)]

    def _has_changed(self, name: str) -> bool:
        try:
            known, key = self.sites.files(name).verify_ledger(), self.sites.ledger(name).fingerprint_key()
        except RunError:
            return False  # the ledger is damaged; the site reports this itself
        mine = (Kind.COMMIT, self.config.run_id())
        events = [event for event in known.events if (event.kind, event.run) == mine] if known else []
        return bool(events) and events[-1].detail.get("fingerprint") != self.work[name].fingerprint(key)

    def site(self, index: int) -> Site:
        """Open a site with its current policy and ledger."""
        return VirtualSite(self, self.config.federation.active[index])


class VirtualSite(WorkingSite):
    """A simulated site with its own policy, ledger and records, and a model shared with the other sites."""

    def __init__(self, everyone: Participants, name: str) -> None:
        ledger, self._everyone, self._work = everyone.sites.ledger(name), everyone, everyone.work[name]
        files = everyone.sites.files(name)
        # Policies of persistent sites may restrict the members of a sum, as at real sites.
        members = files.policy.trust.members or everyone.identities
        super().__init__(files, ledger, everyone.parties[name], members=members)

    def prepare(self, proposal: Proposal) -> PreparedRun:
        """Return the simulation's run. The proposal is not used, because lead and site have the same configuration."""
        everyone, config = self._everyone, self._everyone.config
        return PreparedRun(
            proposal=config.proposal(lead=everyone.sites.lead_key().public, plan=everyone.plan),
            template=everyone.shared.initial_adapter,
            declared_size=self._work.declared_size,
            members=config.federation.active,
            update_dtype=config.federation.update_dtype,
            algorithm=config.federation.bound_algorithm,
        )

    def work(self, run: str) -> SiteWork:
        """Return this site's partition of the simulation's records, with the shared model."""
        return self._work
