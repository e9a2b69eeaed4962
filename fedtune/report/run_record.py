"""A run folder as its files are: configuration, newest checkpoint, `run.json`, and what the run noted of itself.

A run that crashed, was killed or still goes on has no `run.json`, or one without final scores; its checkpoint says what
was asked of whom and which receipts came.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedtune.config import RunConfig, parse, saved_settings
from fedtune.federation.kept_round import is_over
from fedtune.federation.lead import Checkpoints, LeadState, RoundResult
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.release import Receipt
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import Selection
from fedtune.runs.environment import Environment, read_environments, read_selection
from fedtune.runs.results import RunResult
from fedtune.sites.shared_settings import for_sites
from fedtune.spec import RUN_SCHEMA, ConfigError, RunError, check_schema, errors_in

_RESULT = TypeAdapter(RunResult)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run: `result` of its `run.json`, `state` of its newest checkpoint, and the finished `rounds`.

    `config_sha256` is of the configuration that the run really had, where `run.json` says it.
    """

    config: RunConfig
    plan: Plan
    config_sha256: str
    result: RunResult | None
    state: LeadState | None
    rounds: Sequence[RoundResult]
    environments: tuple[Environment, ...]
    selection: Selection | None = None

    @property
    def finished(self) -> bool:
        """Every round was aggregated, or validation scores ended the run."""
        return is_over(self.rounds, self.config.federation, judged_by=self.config.judged_by)

    @cached_property
    def receipts(self) -> Mapping[str, Receipt]:
        """Site -> its newest receipt of this run, where it is the site's own word."""
        stored = self._stored.items()
        return {site: one for site, one in stored if (one.site, one.run) == (site, self.run) and one.is_signed()}

    @cached_property
    def doubtful(self) -> tuple[str, ...]:
        """Sites with a receipt on file that is not signed, of something else, or older than what is known beside it.

        As rounds come in, an older receipt counts as none, and the round as unanswered: what is missing in both was
        put there later.  A checkpoint is written before `run.json` is, so one that knows less was put there, too.
        """
        if self.state is None:
            return ()
        receipts, put_back = self.receipts, len(self.state.rounds) < len(self.rounds)
        # Rounds that the newest checkpoint says may have been charged.
        known = dict(self.state.unanswered)
        for site, receipt in receipts.items():
            known[site] = known.get(site, 0) + receipt.charged_rounds
        found = [site for site in self._stored if site not in receipts or known[site] < self.updates(site)]
        stale = [site for site in self.config.federation.active if put_back or known.get(site, 0) < self._noted(site)]
        return tuple(dict.fromkeys([*found, *stale]))

    def _noted(self, site: str) -> int:
        """Rounds that were charged according to `run.json`, where no later receipt can have said that it were fewer."""
        if self.result is None:
            return 0
        spent, state = self.result.privacy.sites[site], self.state
        resumed_since = state is not None and len(state.rounds) > len(self.result.rounds)
        return 0 if spent.upper_bound and resumed_since else spent.rounds

    @property
    def _stored(self) -> Mapping[str, Receipt]:
        return self.state.receipts if self.state else {}

    @cached_property
    def run(self) -> str:
        """The run's name in the sites' ledgers; its own, where that can't be computed and no receipt says it."""
        config, model, privacy = self.config, self.config.model, self.config.privacy
        if not self.deployed:
            return f"{config.name}-{self.config_sha256[:32]}"
        sha256 = model.sha256 or next((one.model_sha256 for one in reversed(self.environments)), None)
        if config.digest() == self.config_sha256 and sha256 is not None:
            # The noise that was calibrated then, so that it is not searched for again.
            noise = self.plan.noise_multiplier if self.plan.private else privacy.noise_multiplier
            privacy = replace(privacy, noise_multiplier=noise)
            return for_sites(replace(config, model=replace(model, sha256=sha256), privacy=privacy)).run_id()
        # Real sites are sent other settings than the lead's, and what is missing of these has a digest all the same.
        form = re.compile(re.escape(config.name) + "-[0-9a-f]{32}")
        for site, receipt in self._stored.items():
            if receipt.site == site and form.fullmatch(receipt.run) and receipt.is_signed():
                return receipt.run
        return config.name

    def updates(self, site: str) -> int:
        """Finished rounds in which an update left the site: each of them was charged."""
        return sum(result.has_update_of(site) for result in self.rounds)

    @property
    def deployed(self) -> bool:
        return self.config.runtime.kind == "deployment"

    def noise_factor(self, site: str) -> float:
        """By which a site multiplied the plan's noise, by its own word; without that 1, with which epsilon is largest.

        From its receipts; `run.json` says the same where no checkpoint is left.
        """
        if site in self.doubtful:
            return 1.0
        noted = self.result.privacy.sites[site].noise_factor if self.result and not self.state else 1.0
        factor = self.receipts[site].noise_factor if site in self.receipts else noted
        return factor if self.plan.bears(factor) else 1.0

    def charged(self, site: str) -> tuple[int, bool]:
        """Rounds charged to this run at a site, and whether that is an upper bound because the site's word is missing.

        From its receipts; `run.json` says the same where no checkpoint is left.  Where neither covers the site's
        updates, its whole plan counts: the site's ledger grants no more, and less is nobody's word.
        """
        updates, receipt = self.updates(site), self.receipts.get(site)
        if self.state is None:
            known, silent = self._noted(site), 0
            upper_bound = self.result is not None and self.result.privacy.sites[site].upper_bound
        else:
            known, silent = receipt.charged_rounds if receipt else 0, self.state.unanswered.get(site, 0)
            upper_bound = silent > 0
        # A receipt came with each update: where there is none, no count since it covers them.
        if known + (silent if receipt else 0) < updates or site in self.doubtful:
            return max(known, updates, self._noted(site), self.plan.most_rounds), True
        return max(known, min(known + silent, self.plan.most_rounds)), upper_bound


def read_run(folder: Path, *, plan: Plan | None = None) -> RunRecord:
    """The record of a run folder; a ConfigError if it is none, or of several runs, and a RunError if it is damaged.

    With the `plan` of an earlier reading of the same folder, noise that is not on record is not searched for again.
    """
    files, settings = RunFolder(folder), saved_settings(folder)
    with errors_in(files.config):
        config = parse(settings)
    result = _result(folder)
    digest = result.config_sha256 if result else config.digest()
    if not files.saved_checkpoints and result is None:
        raise ConfigError("run folder", str(folder), "must be one of a run that has begun: it has no checkpoint")
    state = Checkpoints(files.checkpoints, digest).load() if files.saved_checkpoints else None
    return RunRecord(
        config=config,
        plan=plan or _plan(folder, config, result),
        config_sha256=digest,
        result=result,
        state=state,
        # Of a checkpoint put back to an earlier one, the rounds that came after it stand in run.json.
        rounds=max(state.rounds if state else (), result.rounds if result else (), key=len),
        environments=read_environments(folder),
        selection=read_selection(folder),
    )


def inexact_gradients(folder: Path, config: RunConfig) -> bool | None:
    """The policies of all simulated sites accept them, so that any machine was taken; None: not on file."""
    if config.runtime.kind == "deployment":
        return None
    sites = Path(config.runtime.sites_dir) if config.runtime.sites_dir else RunFolder(folder).sites
    try:
        policies = [tomllib.loads((sites / name / "site.toml").read_text("utf-8")) for name in config.federation.active]
        accepted = [policy["allow"]["inexact_gradients"] for policy in policies]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return all(accepted) if all(type(one) is bool for one in accepted) else None


def _result(folder: Path) -> RunResult | None:
    """The content of `run.json`; a folder may come from anybody, so its form is checked."""
    path = RunFolder(folder).result
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
        check_schema(f"{path}: schema_version", json.loads(data)["schema_version"], RUN_SCHEMA, of="run folder")
        result = _RESULT.validate_json(data, strict=True)
        json.dumps(result.to_json(), allow_nan=False)  # a ValueError for a number that is not finite
        if not result.privacy.sites:
            raise ValueError("privacy.sites")
    except ConfigError:
        raise
    except (ValueError, TypeError, LookupError, ValidationError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is no run.json of fedtune") from error
    return result


def _plan(folder: Path, config: RunConfig, result: RunResult | None) -> Plan:
    """The run's plan, with the noise that was calibrated then: searching for it again takes a second."""
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
            bound = f"must be what run.json says it was, {noted}"
            raise ConfigError(key, value, bound).in_file(RunFolder(folder).config)
    return plan
