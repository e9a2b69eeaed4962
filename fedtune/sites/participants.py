"""Everyone in a simulation, in one process: virtual sites with their records and ledgers, and the lead with its own."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path

from fedtune.config import RunConfig, parse
from fedtune.data.load import simulated_site_records
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site import Prepared, Site, Trained
from fedtune.model import Adapter
from fedtune.privacy.plan import Plan
from fedtune.sites.shared_model import SharedModel
from fedtune.sites.virtual_site import VirtualSites
from fedtune.sites.work import SiteWork
from fedtune.tasks import task_named


class Participants:
    """One frozen base model, shared by every site and the lead; sites differ in records and ledger only.

    Args:
        config: the run's.
        folder: the run folder, where each site's ledger lies.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.sites = VirtualSites.of(config, folder, config.plan())
        policies = [self.sites.files(name).policy for name in config.federation.active]
        self.shared = SharedModel(config, inexact_allowed=all(one.allow.inexact_gradients for one in policies))

    @cached_property
    def work(self) -> dict[str, SiteWork]:
        """What each active site does in a round, with its records."""
        config, federation, unit = self.config, self.config.federation, self.config.privacy.unit
        records = simulated_site_records(
            config.data,
            columns=task_named(config.task).columns(config.data, partition=True, unit=unit),
            num_sites=federation.num_sites,
            seed=config.seed,
            unit=unit,
        )
        sizes = config.declared_sizes()
        return {
            name: SiteWork(
                name,
                self.shared,
                of_site,
                declared_size=sizes[name],
                max_adapter_value=self.sites.files(name).policy.adapter_bound(config.lora.scale),
            )
            for name, of_site in zip(federation.names, records, strict=True)
            if name in federation.active
        }

    @property
    def plan(self) -> Plan:
        """The run's plan, its noise calibrated once in a process."""
        return self.sites.plan

    def site(self, index: int) -> Site:
        """Open a site with its ledger, as the file stands now."""
        name = self.config.federation.active[index]
        ledger, work = self.sites.ledger(name), self.work[name]

        def train(request: RoundRequest, adapter: Adapter, attempt: int) -> Trained:
            return work.do(request, adapter, attempt, fingerprint_key=ledger.fingerprint_key())

        prepared = Prepared(
            proposal=self.config.proposal(lead=self.sites.lead_key().public, plan=self.plan),
            template=self.shared.initial_adapter,
            declared_size=work.declared_size,
            train=train,
        )
        return Site(name=name, ledger=ledger, prepare=lambda _: prepared)


@lru_cache(maxsize=1)
def participants(config_json: str, folder: str) -> Participants:
    """A run's participants in this process, built on first use: a Ray actor keeps its base model between rounds."""
    return Participants(parse(json.loads(config_json)), Path(folder))
