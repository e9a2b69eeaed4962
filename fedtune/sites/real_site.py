"""A real site: its files, records and models, and its responses to the requests of leads."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.codec import parse_json, read_regular_file
from fedtune.config import RunConfig, format_config_yaml
from fedtune.data.formats import fingerprint_files, require_reader
from fedtune.data.load import SiteRecords, read_own_records
from fedtune.data.partition import count_units
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.secure.at_site import Parties
from fedtune.federation.site_round import PreparedRun, Site, TrainingResult
from fedtune.model.adapter import Adapter
from fedtune.privacy.durable import write_durably
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.shared_settings import localize_settings, read_settings
from fedtune.sites.site_settings import read_site_settings
from fedtune.sites.work import SiteWork, WorkingSite
from fedtune.spec import ConfigError
from fedtune.tasks.saved import save_task_model
from fedtune.tasks.task_model import TaskModel
from fedtune.training.spec import Machine

log = logging.getLogger(__name__)
_SHAPES = ".shapes"  # ending of the files with the names and shapes of runs' adapters, next to the runs' settings


@dataclass(kw_only=True)
class SiteProcess:
    """The state of a real site's process between requests: file paths, and the model and records of the newest run."""

    site_toml: Path  # path of the policy
    installed: Callable[[str], Path]  # base model hash -> installed folder; raises ConfigError if missing
    paused: Callable[[], bool]  # whether the site is paused
    runs: Path  # folder for the settings that leads sent
    adapters: Path  # folder for final adapters
    # callback for a run that awaits approval, with its settings and the lead's version of fedtune
    awaits: Callable[[Proposal, str, str], None]
    open_ledger: Callable[[SiteFiles], SiteLedger]  # raises RunError for a ledger that was lost or replaced
    _warm: tuple[str, SiteWork] | None = field(default=None, init=False)
    _model: LoadedModel | None = field(default=None, init=False)
    parties: Parties = field(default_factory=Parties, init=False)

    def site(self, settings: str) -> Site:
        """Open the site with its current files.

        Args:
            settings: the lead's run settings, as unvalidated JSON.

        Raises:
            ConfigError: the policy cannot be read, or belongs to a simulated site.
            RunError: the ledger is damaged or not writable.
        """
        files = SiteFiles.from_site_toml(self.site_toml)
        if files.policy.simulated:
            raise ConfigError("simulated", True, "must be false at a real site").in_file(self.site_toml)
        return RealSite(self, files, read_site_settings(self.site_toml).machine, settings)

    def work(self, run: str, shared: RunModel, files: SiteFiles) -> SiteWork:
        """Return the site's records for a run, with the run's model.

        The result is cached until the run, its file, the policy or the machine settings change.
        """
        version = fingerprint_files(Path(shared.config.data.train_file))
        # The whole policy is part of the key, so that every change takes effect; changes are rare.
        key = json.dumps([run, version, shared.config.to_json(), files.policy.digest()], sort_keys=True)
        if self._warm is None or self._warm[0] != key:
            self._warm = None  # first, so that the records of two runs are never in memory together
            self._warm = key, self._load_work(shared, files)
            log.info("the records and the model of a run are loaded", extra={"run": run})
        return self._warm[1]

    def _load_work(self, shared: RunModel, files: SiteFiles) -> SiteWork:
        records = read_site_records(shared.config, files)
        left_out = records.left_out
        if left_out.exceeds_threshold:  # logged at the site only; never sent
            about = {
                "rows": left_out.rows,
                "left_out": left_out.count,
                "share": round(left_out.count / left_out.rows, 3),
            }
            log.warning("a large share of the records cannot be used for this run", extra=about)
        self._compare_with_min_units(records, files.policy, shared.config.data.dataset)
        return SiteWork(
            files.policy.site,
            shared,
            records,
            declared_size=files.policy.declared_size(shared.config.data.dataset),
            max_adapter_value=files.policy.compute_adapter_bound(shared.config.lora.scale),
            lenient=True,
        )

    def _compare_with_min_units(self, records: SiteRecords, policy: Policy, name: str) -> None:
        """Log that a data set has fewer units than its `min_units`, for the site's own staff.

        Guarantee: the number changes no answer, and is counted only here, within the padded reply time of a charged
        round. Counting at any other time would slow down answers by a measurable amount.
        """
        dataset = next(declared for declared in policy.dataset if declared.id == name)
        if count_units([*records.training, *records.heldout], policy.population.unit) < dataset.min_units:
            log.warning("a data set has fewer units than min_units in site.toml", extra={"dataset": name})

    def shared_model(self, config: RunConfig, policy: Policy) -> RunModel:
        """Return the model of a run. Runs with the same model and machine settings share one loaded model.

        Only a model that passed its batch-invariance test is cached.

        Guarantee: no record is freed here, because freeing takes time in proportion to the number of records, and a
        sender could measure this time without any charge. `work` frees them, within the padded reply time of a charged
        round.
        """
        size, inexact = policy.declared_size(config.data.dataset), policy.allow.inexact_gradients
        kept = self._model
        if kept is not None and kept.is_reusable_for(config, declared_size=size, inexact_allowed=inexact):
            return RunModel(kept, config)
        del kept
        self._free_model()
        began = time.monotonic()
        self._model = LoadedModel(config, declared_size=size, inexact_allowed=inexact)
        about = {"sha256": config.model.sha256, "model_s": round(time.monotonic() - began, 3)}
        log.info("the base model is loaded", extra=about)
        if self._model.moved > 0:
            log.warning(
                "per-example gradients depend on the rest of the batch by rounding; the policy allows this",
                extra={"moved": self._model.moved},
            )
        return RunModel(self._model, config)

    def untested_model(self, config: RunConfig, policy: Policy) -> TaskModel:
        """Return the untested model of a run for saving an adapter; testing takes minutes, and training requires it."""
        size = policy.declared_size(config.data.dataset)
        if self._model is not None and self._model.is_reusable_for(config, declared_size=size, inexact_allowed=True):
            return self._model.model
        self._free_model()
        return LoadedModel(config, declared_size=size, trains=False).model

    def _free_model(self) -> None:
        """Free the old model before another one is loaded."""
        if self._warm is not None and self._warm[0]:  # keep the records without a key and without the model
            self._warm = "", self._warm[1]
            self._warm[1].drop_model()
        self._model = None


class RealSite(WorkingSite):
    """A site with records of real people, opened for one request."""

    def __init__(self, process: SiteProcess, files: SiteFiles, machine: Machine, settings: str) -> None:
        super().__init__(files, process.open_ledger(files), process.parties, members=files.policy.trust.members)
        self._process, self._files, self._machine, self._settings = process, files, machine, settings

    @property
    def paused(self) -> bool:
        """Whether a person at the site has paused all training."""
        return self._process.paused()

    def check_settings(self, proposal: Proposal) -> None:
        """Check the settings of a request without loading the model or any record.

        Raises:
            Refused: the settings do not match the proposal, or cannot be used at this site.
        """
        self._localize_settings(self._read_matching_settings(proposal))

    def _read_matching_settings(self, requested: Proposal) -> RunConfig:
        """Parse the settings of a request, and check that they match the run's name and proposal.

        Raises:
            Refused: the settings are unreadable, or belong to another run, site or plan.
        """
        sent, site = read_settings(self._settings, plan=requested.plan, task=requested.task), self._files.policy.site
        if sent.run_id() != requested.run:
            # The run's name contains a digest of its settings, so that the lead's signature covers them.
            raise Refused(Reason.WRONG_RUN, requested=requested.run, allowed=sent.run_id())
        if site not in sent.declared_sizes():
            raise Refused(Reason.WRONG_SITE, requested=", ".join(sent.declared_sizes()), allowed=site)
        # Derived from the settings, because the policy has checked only the request.
        proposal = sent.proposal(lead=requested.lead, plan=sent.plan())
        if proposal != requested:
            raise Refused(Reason.PLAN_CHANGED, requested=requested.digest(), allowed=proposal.digest())
        return sent

    def _localize_settings(self, sent: RunConfig) -> RunConfig:
        folder = self._process.site_toml.parent
        policy, installed = self._files.policy, self._process.installed
        return localize_settings(sent, policy, self._machine, folder=folder, installed=installed)

    def prepare(self, proposal: Proposal) -> PreparedRun:
        """Check the settings, then load and test the model unless this process has a suitable model."""
        config = self._localize_settings(self._read_matching_settings(proposal))
        Path(config.data.train_file).stat()  # a file that is missing reveals no record, so it need not cost a round
        require_reader(Path(config.data.train_file))
        self._shared = self._process.shared_model(config, self._files.policy)
        return PreparedRun(
            proposal=proposal,
            template=self._shared.initial_adapter,
            declared_size=config.declared_sizes()[self.name],
            members=config.federation.active,
            update_dtype=config.federation.update_dtype,
            algorithm=config.federation.bound_algorithm,
        )

    def store_run(self, run: PreparedRun) -> None:
        """Store a run's settings and adapter shapes, and delete those of runs that were never charged."""
        # Serialized again, because a lead may add any amount of whitespace.
        shortest = json.dumps(json.loads(self._settings), ensure_ascii=False, separators=(",", ":"))
        stored, name = self._process.runs, run.proposal.run
        write_durably(stored / f"{name}.json", shortest.encode())
        write_durably(stored / f"{name}{_SHAPES}", json.dumps(run.template.shapes).encode())
        for file in {*stored.glob("*.json"), *stored.glob(f"*{_SHAPES}")}:
            if file.stem not in self.ledger.history.runs:  # never charged
                file.unlink(missing_ok=True)

    def work(self, run: str) -> SiteWork:
        """Return the site's records for a prepared run, with the run's model."""
        return self._process.work(run, self._shared, self._files)

    def train(
        self, request: RoundRequest, adapter: Adapter, attempt: int, admitted: Collection[str] | None = None
    ) -> TrainingResult:
        """Train as any site, and keep the records from the garbage collector.

        A lead can cause full collections without a charge, by large requests, and their time must not grow with the
        records in memory.
        """
        try:
            return super().train(request, adapter, attempt, admitted)
        finally:
            gc.collect()
            gc.freeze()

    def _read_stored_settings(self, run: str) -> RunConfig:
        """Read the stored settings of an accepted run, since the notice of its end contains none."""
        settings = read_regular_file(self._process.runs / f"{run}.json").decode()
        proposal = self.ledger.history.runs[run].proposal
        return self._localize_settings(read_settings(settings, plan=proposal.plan, task=proposal.task))

    def read_adapter_shapes(self, run: str) -> Mapping[str, list[int]] | None:
        """Return the tensor shapes that `store_run` stored for a run; None if they are missing or damaged."""
        with suppress(OSError, ConfigError):
            data = read_regular_file(self._process.runs / f"{run}{_SHAPES}")
            return parse_json(data, key=run, bound="must have stored shapes")
        return None

    def store_adapter(self, run: str, adapter: Adapter) -> None:
        """Save the final adapter in the folder format of `fedtune evaluate`."""
        config = self._read_stored_settings(run)
        model = self._process.untested_model(config, self._files.policy)
        adapter.load_into(model)
        folder = RunFolder(self._process.adapters / run)
        save_task_model(model, folder.adapter)
        write_durably(folder.config, format_config_yaml(config))
        log.info("the final adapter is stored", extra={"run": run})

    def await_approval(self, proposal: Proposal, *, software: str) -> None:
        """Submit a run for approval by a person at the site, with its settings and the lead's version of fedtune.

        Raises:
            Refused: the settings of the request do not match the proposal.
        """
        self._process.awaits(
            proposal, json.dumps(self._read_matching_settings(proposal).decisive(), sort_keys=True), software
        )


def read_site_records(config: RunConfig, files: SiteFiles) -> SiteRecords:
    """Read a site's training and held-out records for a run.

    Args:
        config: the run's configuration, localized to the site.
        files: files of the site; its secret key selects the held-out records.
    """
    key = files.load_key().derive_secret("held-out split")
    data, unit, task = config.data, config.privacy.unit, config.bound_task
    return read_own_records(
        data, columns=task.columns(data, unit=unit), fault=task.record_validator(data), key=key, unit=unit
    )
