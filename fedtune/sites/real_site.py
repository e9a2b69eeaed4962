"""A real site: its own files, records and models, and the runs that leads send it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.config import RunConfig, config_yaml
from fedtune.data.formats import require_reader, version_of
from fedtune.data.load import SiteRecords, own_records
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.secure.at_site import Parties
from fedtune.federation.site_round import Prepared, Site
from fedtune.model.adapter import Adapter
from fedtune.privacy.durable import write_durably
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.shared_settings import at_site, read_settings
from fedtune.sites.work import SiteWork, WorkingSite
from fedtune.spec import ConfigError
from fedtune.tasks.saved import save_task_model

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SiteProcess:
    """A real site's process between requests: model and records of the newest run, and the places of its files."""

    site_toml: Path  # its policy
    installed: Callable[[str], Path]  # the folder of an installed base model, by hash; raises ConfigError for none
    paused: Callable[[], bool]  # whether the site is paused
    runs: Path  # folder for the settings that leads sent
    adapters: Path  # folder for final adapters
    # called for each run that waits for a person's approval, with its settings and its lead's version of fedtune
    awaits: Callable[[Proposal, str, str], None]
    _warm: tuple[str, SiteWork] | None = field(default=None, init=False)
    _model: LoadedModel | None = field(default=None, init=False)
    parties: Parties = field(default_factory=Parties, init=False)

    def site(self, settings: str) -> Site:
        """Open the site as its files stand now, for a run with these settings (JSON as a lead sent it, unchecked).

        Raises:
            ConfigError: the policy cannot be read, or is of a simulated site.
            RunError: the ledger cannot be trusted or written.
        """
        files = SiteFiles.of(self.site_toml)
        if files.policy.simulated:
            raise ConfigError("simulated", True, "must be false: this is a real site").in_file(self.site_toml)
        return RealSite(self, files, settings)

    def work(self, run: str, shared: RunModel, files: SiteFiles) -> SiteWork:
        """The run's records with the model; kept until another run comes, or files, policy or machine change."""
        version = version_of(Path(shared.config.data.train_file))
        # The whole policy, so that no figure of it is forgotten that a round goes by: it seldom changes.
        key = json.dumps([run, version, shared.config.to_json(), files.policy.digest()], sort_keys=True)
        if self._warm is None or self._warm[0] != key:
            self._warm = None  # first, so that two runs' records never fill the memory together
            self._warm = key, self._loaded(shared, files)
            log.info("ready for a run", extra={"run": run})
        return self._warm[1]

    def _loaded(self, shared: RunModel, files: SiteFiles) -> SiteWork:
        records = site_records(shared.config, files)
        if (left_out := records.left_out).is_much:  # for the site's own people: nothing of it is sent to anybody
            about = {
                "rows": left_out.rows,
                "left_out": left_out.count,
                "share": round(left_out.count / left_out.rows, 3),
            }
            log.warning("a large part of the records cannot be used for this run", extra=about)
        return SiteWork(
            files.policy.site,
            shared,
            records,
            declared_size=files.policy.declared_size(shared.config.data.dataset),
            max_adapter_value=files.policy.adapter_bound(shared.config.lora.scale),
            lenient=True,
        )

    def shared_model(self, config: RunConfig, policy: Policy) -> RunModel:
        """The model, kept while runs want the same one on the same machine; only one that passed its try is kept.

        Guarantee: no record is freed here, since that takes as long as there are records, and whoever asks may be
        charged nothing.  `work` frees them, which is held to the schedule of a charged round's answers.
        """
        size, inexact = policy.declared_size(config.data.dataset), policy.allow.inexact_gradients
        kept = self._model
        if kept is not None and kept.serves(config, declared_size=size, inexact_allowed=inexact):
            return RunModel(kept, config)
        if self._warm is not None and self._warm[0]:  # from now on under no run's key, and without a model
            self._warm = "", self._warm[1]
            self._warm[1].drop_model()
        kept = self._model = None  # the old one goes before the new one comes
        began = time.monotonic()
        self._model = LoadedModel(config, declared_size=size, inexact_allowed=inexact)
        about = {"sha256": config.model.sha256, "model_s": round(time.monotonic() - began, 3)}
        log.info("the base model is loaded", extra=about)
        if self._model.moved > 0:
            log.warning(
                "this machine rounds an example by its neighbours, as the policy accepts: the bound is measured",
                extra={"moved": self._model.moved},
            )
        return RunModel(self._model, config)


class RealSite(WorkingSite):
    """A site of real people's records, opened for a request with a run's settings."""

    def __init__(self, process: SiteProcess, files: SiteFiles, settings: str) -> None:
        super().__init__(files, files.open(), process.parties, members=files.policy.trust.members)
        self._process, self._files, self._settings = process, files, settings

    @property
    def paused(self) -> bool:
        """A person at the site wants it to pause."""
        return self._process.paused()

    def check_settings(self, proposal: Proposal) -> None:
        """Check the settings that came with the request; loads nothing."""
        self._at_site(self._as_named(proposal))

    def _as_named(self, asked: Proposal) -> RunConfig:
        """The settings that were sent, which are those that the run was named after."""
        sent, site = read_settings(self._settings, plan=asked.plan), self._files.policy.site
        if sent.run_id() != asked.run:
            # The run's name holds a digest of its settings, so that the lead's signature covers them.
            raise Refused(Reason.WRONG_RUN, asked=asked.run, allowed=sent.run_id())
        if site not in sent.declared_sizes():
            raise Refused(Reason.WRONG_SITE, asked=", ".join(sent.declared_sizes()), allowed=site)
        # Made of the settings, since it is the request alone that the policy has judged.
        proposal = sent.proposal(lead=asked.lead, plan=sent.plan())
        if proposal != asked:
            raise Refused(Reason.PLAN_CHANGED, asked=asked.digest(), allowed=proposal.digest())
        return sent

    def _at_site(self, sent: RunConfig) -> RunConfig:
        folder = self._process.site_toml.parent
        return at_site(sent, self._files.policy, folder=folder, installed=self._process.installed)

    def prepare(self, proposal: Proposal) -> Prepared:
        """Check the settings, and load and try the model where the process has not got it yet."""
        config = self._at_site(self._as_named(proposal))
        Path(config.data.train_file).stat()  # a file that is missing tells of no record, and need not cost a round
        require_reader(Path(config.data.train_file))
        self._shared = self._process.shared_model(config, self._files.policy)
        return Prepared(
            proposal=proposal,
            template=self._shared.initial_adapter,
            declared_size=config.declared_sizes()[self.name],
            members=config.federation.active,
            update_dtype=config.federation.update_dtype,
        )

    def store(self, proposal: Proposal) -> None:
        """Keep the settings, and no others than those of runs that were charged."""
        # No longer than what they say: a lead may send as many spaces as it likes.
        shortest = json.dumps(json.loads(self._settings), ensure_ascii=False, separators=(",", ":"))
        write_durably(self._process.runs / f"{proposal.run}.json", shortest.encode())
        for file in set(self._process.runs.glob("*.json")):
            if file.stem not in self.ledger.history.runs:  # it was never charged
                file.unlink(missing_ok=True)

    def work(self, run: str) -> SiteWork:
        """The site's records with the model, for a run that was prepared."""
        return self._process.work(run, self._shared, self._files)

    def keep(self, run: str, adapter: Adapter) -> None:
        """Write the final adapter as a folder that `fedtune evaluate` takes."""
        settings = (self._process.runs / f"{run}.json").read_text(encoding="utf-8")
        config = self._at_site(read_settings(settings, plan=self.ledger.history.runs[run].proposal.plan))
        shared = self._process.shared_model(config, self._files.policy)
        if not adapter.same_shapes(shared.initial_adapter):
            raise ConfigError("final adapter", run, "must have the names and shapes that the run trained")
        adapter.load_into(shared.model)
        folder = RunFolder(self._process.adapters / run)
        save_task_model(shared.model, folder.adapter)
        write_durably(folder.config, config_yaml(config))
        log.info("the final adapter is kept", extra={"run": run})

    def await_approval(self, proposal: Proposal, *, software: str) -> None:
        """Put the run before a person here, with the settings it was named after and its lead's version of fedtune.

        Raises:
            Refused: other settings came with the request, whatever it asks for, so that there is nothing to show.
        """
        self._process.awaits(proposal, json.dumps(self._as_named(proposal).decisive(), sort_keys=True), software)


def site_records(config: RunConfig, files: SiteFiles) -> SiteRecords:
    """A site's records for a run: what it trains on, and what it holds out.

    Args:
        config: of the run, with the site's own files in it.
        files: of the site, whose key decides what is held out: nobody outside knows of a record which it is.
    """
    key = files.key().secret("held-out split")
    data, unit, task = config.data, config.privacy.unit, config.bound_task
    return own_records(data, columns=task.columns(data, unit=unit), fault=task.fault(data), key=key, unit=unit)
