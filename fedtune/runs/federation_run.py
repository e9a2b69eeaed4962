"""The lead's side of a run, independent of the sites' runtime: initial state, rounds over a transport, and result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Protocol

from fedtune.config import RunConfig
from fedtune.federation.early_stopping import select_round, warn_of_interrupted_round
from fedtune.federation.invitation import ProposedRun
from fedtune.federation.lead import Aggregation, Checkpoints, Lead, LeadState, read_receipts, save_receipts
from fedtune.federation.planner import check_signal
from fedtune.federation.rounds import run_rounds
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.transport import Transport
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.model.ranks import count_trained_values
from fedtune.privacy.durable import write_durably
from fedtune.privacy.proposal import Proposal
from fedtune.runs.cost import Meter
from fedtune.runs.environment import build_start_lineage, read_environments, record_environment
from fedtune.runs.results import DATA_CHANGED, BaseModel, FinalResult, RunProvenance, RunResult, Template, find_problems
from fedtune.sites.data_warnings import check_decision_scores, list_lead_data_warnings, list_signal_warnings
from fedtune.sites.shared_model import RunModel
from fedtune.spec import RunError
from fedtune.system import MEMORY_UNIT, resource
from fedtune.tasks.measures import Detail
from fedtune.tasks.saved import save_task_model


class Listener(Protocol):
    """An observer of a run's progress, such as a terminal display."""

    def on_preparing(self, what: str, done: int, total: int) -> None:
        """Report the progress of a preparation step: number of finished items, and their total (0: unknown)."""

    def note(self, text: str) -> None:
        """Report a warning about the data, before training begins."""

    def on_prepared(self, shared: RunModel, proposal: Proposal, state: LeadState) -> None:
        """Report that data and model are ready, before training begins."""

    def on_site_replied(self, number: int) -> None:
        """Report the arrival of reply `number` in the current round."""

    def on_site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        """Report a real site's answer: "update" or the reason of a refusal, with the charged rounds in its receipt."""

    def on_round_finished(self, state: LeadState) -> None:
        """Report that a round was aggregated, scored and checkpointed."""


class UpdatingListener:
    """A listener that passes each state first to `updates`, such as a tracker's method, then to another listener."""

    def __init__(self, listener: Listener, *updates: Callable[[LeadState], None]) -> None:
        self._listener, self._updates = listener, updates
        self.on_preparing, self.note = listener.on_preparing, listener.note
        self.on_site_replied, self.on_site_answered = listener.on_site_replied, listener.on_site_answered

    def on_prepared(self, shared: RunModel, proposal: Proposal, state: LeadState) -> None:
        self._update(state)
        self._listener.on_prepared(shared, proposal, state)

    def on_round_finished(self, state: LeadState) -> None:
        self._update(state)
        self._listener.on_round_finished(state)

    def _update(self, state: LeadState) -> None:
        for update in self._updates:
            update(state)


Engine = Callable[[Callable[[Transport], LeadState]], LeadState]
"""Function that opens a transport to the sites, runs the rounds over it, and returns the lead's final state."""


@dataclass(frozen=True, kw_only=True)
class FederationRun:
    """A federated run, assembled from the components that differ between simulation and deployment."""

    config: RunConfig
    folder: Path  # the run folder
    shared: RunModel  # the lead's model and data
    asked: ProposedRun  # the proposed run and its sites
    average: Aggregation  # aggregates plain updates
    receipts: Path  # file with the sites' newest receipts, shared by several runs
    engine: Engine  # runs the rounds
    # runtime-specific checks before anything is charged; returns warnings about the sites' records, and the sites
    # with changed records
    ready: Callable[[], tuple[Sequence[str], Sequence[str]]] = lambda: ((), ())
    gives_adapter: bool = False  # whether the sites receive the final adapter

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(RunFolder(self.folder).checkpoints, self.config.digest())

    def run_to_end(self, listener: Listener) -> RunResult:
        """Run from the start or from the newest checkpoint to the end, write the run folder, and return the result.

        Raises:
            ConfigError: data, model or checkpoint do not match the configuration; raised before any training.
            RunError: too few sites replied.
        """
        with Meter(self.config.cost) as meter:
            return self._run(listener, meter)

    def _run(self, listener: Listener, meter: Meter) -> RunResult:
        began = time.monotonic()
        state = self._find_initial_state(listener)
        record_environment(self.folder, self.shared)
        began -= state.seconds

        def measure_seconds() -> float:
            return time.monotonic() - began

        def finish_round(state: LeadState) -> None:
            save_receipts(self.receipts, state.receipts)
            listener.on_round_finished(state)

        keys, known = self.asked.site_keys, read_receipts(self.receipts)
        earlier = {site: entry for site, entry in known.items() if entry.site_key == keys.get(site, entry.site_key)}
        lead = Lead(
            asked=self.asked,
            training=self.config.training,
            lora=self.config.lora,
            declared_sizes=self.config.declared_sizes(),
            average=self.average,
            checkpoints=self._checkpoints,
            evaluate=lambda adapter: self.shared.score(adapter, self.shared.validation),
            finished=finish_round,
            elapsed=measure_seconds,
            primary_metric=self.config.primary_metric,
            earlier_receipts=earlier,
            gives_adapter=self.gives_adapter,
        )
        listener.on_prepared(self.shared, self.asked.proposal, state)
        try:
            state = self.engine(lambda transport: run_rounds(transport, lead, state))
        except BaseException:
            # Charges are recorded even for a run that ends early.
            self._write_result(self._checkpoints.load(), metrics={}, seconds=measure_seconds(), meter=meter)
            raise
        save_receipts(self.receipts, state.receipts)
        measured, model = self.shared.evaluate_final(state.kept_adapter), self.shared.model
        metrics, detail = (measured.compute_final_scores(model), measured.detail(model)) if measured else ({}, None)
        state.kept_adapter.load_into(model)
        save_task_model(model, RunFolder(self.folder).adapter)
        seconds, digest = measure_seconds(), compute_adapter_digest(RunFolder(self.folder).adapter)
        return self._write_result(state, metrics=metrics, detail=detail, seconds=seconds, meter=meter, digest=digest)

    def _find_initial_state(self, listener: Listener) -> LeadState:
        """Return the newest checkpoint, or the initial adapter with its scores on the test file.

        All files are read and tokenized here, so that errors in them end the run before anything is charged.
        """
        if self.config.resume is not None:
            state = self._checkpoints.load()
            if unsigned := [site for site, receipt in state.receipts.items() if not receipt.has_valid_signature()]:
                raise RunError(f"the newest checkpoint has a receipt not signed by {', '.join(unsigned)}")
        elif not self.config.training.ignore_weak_signal:
            adapter = self.shared.initial_adapter
            values = count_trained_values(adapter.tensors, self.config.federation.site_ranks)
            sizes = self.config.declared_sizes()
            check_signal(self.asked.proposal.plan, sizes, values=fmean(values.values()))
        if self.config.federation.uses_validation_scores:
            check_decision_scores(self.config)
        validation, test = self.shared.validation, self.shared.test
        notes, changed = self.ready()
        for text in (*list_lead_data_warnings(self.config, validation=validation, test=test), *notes):
            listener.note(text)
        if self.config.resume is not None:
            for round in dict(self._checkpoints.list_requests(after=state.round)):
                listener.note(warn_of_interrupted_round(round))
            state = replace(state, data_changed=tuple(sorted({*state.data_changed, *changed})))
            if state.data_changed:
                listener.note(_warn_of_changed_records(state.data_changed))
            return state
        adapter = self.shared.first_adapter()
        listener.on_preparing("scoring the model before training", 0, 0)
        measured = self.shared.evaluate_final(adapter)
        before = measured.compute_final_scores(self.shared.model) if measured else {}
        for text in list_signal_warnings(self.config, self.shared):
            listener.note(text)
        start = build_start_lineage(self.config)
        state = LeadState(round=0, adapter=adapter, metrics_before=before, start_adapter=start)
        self._checkpoints.save(state)
        return state

    def _write_result(
        self,
        state: LeadState,
        *,
        metrics: Mapping[str, float],
        seconds: float,
        meter: Meter,
        detail: Detail | None = None,
        digest: str | None = None,
    ) -> RunResult:
        """Write `run.json` with the digest of the saved final adapter, and return the content of the file."""
        config, test = self.config, self.shared.test
        guess = config.bound_task.majority_baseline(test.examples) if test else None
        findings = find_problems(
            state.rounds,
            state.metrics_before,
            metrics,
            primary_metric=config.primary_metric,
            guess=guess,
            rows=len(test.records) if test else 0,
        )
        final = FinalResult(
            metrics=metrics,
            metrics_before=state.metrics_before,
            constant=guess,
            seconds=seconds,
            # Of this process only; Ray actors are not its children.
            peak_memory_bytes=None
            if resource is None
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MEMORY_UNIT,
            findings=(DATA_CHANGED, *findings) if state.data_changed else findings,
            selected_round=select_round(state.rounds, config.federation, primary_metric=config.primary_metric),
            energy=meter.stop(),
            detail=detail,
        )
        result = RunResult.build(
            config, self.asked.proposal.plan, state, final=final, provenance=self._build_provenance(state)
        )
        result = replace(result, adapter_digest=digest)
        write_durably(RunFolder(self.folder).result, json.dumps(asdict(result), indent=2).encode() + b"\n")
        return result

    def _build_provenance(self, state: LeadState) -> RunProvenance:
        """Build the adapter's provenance from the settings, the loaded model and the start adapter."""
        data, shared, model = self.config.data, self.shared, self.config.model
        template = None
        if shared.model.task.predicts_tokens or "text" in data.template_roles:
            text = str(shared.tokenizer.chat_template) if data.chat_template == "model" else data.prompt_template
            digest = hashlib.sha256(text.encode()).hexdigest()
            template = Template(prompt=data.prompt_template, chat=data.chat_template, sha256=digest)
        return RunProvenance(
            dataset=data.dataset,
            declared_sizes=self.config.declared_sizes(),
            base_model=BaseModel(
                path=model.public_path,
                public_id=model.public_id,
                gguf_file=model.gguf_file,
                sha256=read_environments(self.folder)[-1].model_sha256,
                license=model.license,
            ),
            start_adapter=state.start_adapter,
            template=template,
            test_rows=len(shared.test.records) if shared.test else None,
        )


def _warn_of_changed_records(sites: Sequence[str]) -> str:
    return (
        f"The records of {', '.join(sites)} have changed since the run started: its epsilon holds for each version of "
        "the records separately, and its scores may belong to different records."
    )
