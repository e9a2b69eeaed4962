"""A federation of two sites and a lead in a folder: what a process does there, and does again after a death."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from observer import Outside, Seen, kept_requests
from points import Doomed, install
from process import Job

import fedtune.flower.client as client
import fedtune.flower.simulation as simulation
import fedtune.sites.virtual_site as virtual_site
from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.federation.protocol import Reply, RoundRequest, Signed
from fedtune.federation.site_round import Site, TrainingResult, answer
from fedtune.model.adapter import Adapter
from fedtune.privacy.site_policy import Policy
from fedtune.sites.virtual_site import Participants
from fedtune.spec import RefusedError, RunError

ANCHORED = "site-1"
"""The site whose policy names an anchor; the other one has none."""
_OVERRIDES = (
    "name=killed", "runtime.device=cpu", "runtime.num_threads=1", "privacy.noise_multiplier=4.0",
    "data.max_length=16", "data.validation_rows=10", "data.test_rows=10", "federation.num_rounds=3",
    "federation.update_dtype=float32",
)  # fmt: skip
_BANKING = ("experiment=debug", "data.train_fraction=0.02", "data.declared_sizes=90")
PEOPLE = "people.jsonl"
SETTINGS = {
    "spare rounds": (*_BANKING, "federation.spare_rounds=4"),
    "arrivals": (
        "experiment=debug_users", "data.train_fraction=1.0", "federation.spare_rounds=4", "+data.columns.arrival=came",
        "privacy.cohorts={period:year,first:'2025',last:'2026'}",
    ),
    "no spare round": (*_BANKING, "federation.spare_rounds=0"),
    "scores": (*_BANKING, "federation.spare_rounds=2", "privacy.metrics=noised", "data.heldout_fraction=0.2"),
}  # fmt: skip
"""Kinds of runs, by name; to the one with arrivals belong people of three years, of whom it admits those of two."""


@dataclass(frozen=True)
class Setting:
    """A kind of run, and everyone who takes part, built once in the parent."""

    config: RunConfig
    everyone: Participants

    @classmethod
    def build(cls, overrides: tuple[str, ...], folder: Path) -> Setting:
        """Everything that needs no file of a site is loaded and computed here, before the first fork."""
        if overrides[0] == "experiment=debug_users":
            rows = [{"text": f"message {n}", "user": f"{n % 60}", "came": f"{2024 + n % 3}-05-01"} for n in range(240)]
            (folder / PEOPLE).write_text("".join(json.dumps(row) + "\n" for row in rows))
            overrides += (f"data.train_file='{folder / PEOPLE}'",)
        config = compose_run([*overrides, *_OVERRIDES, f"tracking.output_dir='{folder}'"])
        everyone = Participants(config, folder)
        _ = [(work.examples, work._heldout) for work in everyone.work.values()]
        _ = everyone.shared.validation, everyone.shared.test
        virtual_site.generate_policy(config, everyone.plan, ANCHORED, lead=everyone.sites.lead_key().public)
        return cls(config, everyone)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names."""
        return self.config.federation.active


class _Silent:
    """A listener to a run."""

    def on_preparing(self, what: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def on_prepared(self, shared: object, proposal: object, state: LeadState) -> None: ...

    def on_site_replied(self, number: int) -> None: ...

    def on_site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None: ...

    def on_round_finished(self, state: LeadState) -> None: ...


Break = Callable[[], Callable[[], None]]
"""Puts the ledger's writes into a wrong order; returns what is called once a reply has left."""


def run(setting: Setting, folder: Path, *, spill: bool = False, broken: Break | None = None) -> Job:
    """A job: run the federation in `folder`, or resume it, to its end."""

    def job(doomed: Doomed, outside: Outside) -> None:
        _prepare(setting, folder, doomed, outside, spill=spill, broken=broken)
        begun = any((folder / "checkpoints").glob("round-*.safetensors"))
        config = replace(setting.config, resume=str(folder)) if begun else setting.config
        with doomed.within("lead"):
            try:
                simulation.simulate(config, folder, _Silent(), everyone=setting.everyone)
            except RefusedError as refused:
                outside.tell("refused", why=str(refused)[:2000])
        crossed = {"points": doomed.crossed, "seconds": doomed.seconds}
        (folder / "crossed.json").write_text(json.dumps(crossed))

    return job


def ask_again(setting: Setting, folder: Path, seen: Mapping[str, Seen]) -> Job:
    """A job: at the sites in `folder`, ask every request again that was ever sent, with the newest receipt."""

    def job(doomed: Doomed, outside: Outside) -> None:
        requests = kept_requests(folder / "requests")
        _prepare(setting, folder, doomed, outside)
        for request, adapter in requests:
            receipt = seen[request.site].receipt if request.site in seen else None
            signed = replace(request, receipt=receipt).sign_with(setting.everyone.sites.lead_key())
            with contextlib.suppress(RunError):  # the parent was told
                site = setting.everyone.site(setting.names.index(request.site))
                outside.reply(signed, answer(site, signed, adapter))

    return job


def _prepare(
    setting: Setting,
    folder: Path,
    doomed: Doomed,
    outside: Outside,
    *,
    spill: bool = False,
    broken: Break | None = None,
) -> None:
    """Make this process work in `folder`, be seen, and have points."""
    logging.disable(logging.ERROR)
    everyone = setting.everyone
    everyone.sites = replace(everyone.sites, folder=folder / "sites")
    _add_anchor()
    late = None if broken is None else broken()
    install(doomed, spill=spill)
    _watch_training(everyone, doomed, outside)
    _watch_replies(setting, doomed, outside, late)


def _add_anchor() -> None:
    generated = virtual_site.generate_policy

    def anchored(config: RunConfig, plan: object, site: str, *, lead: str) -> Policy:
        policy = generated(config, plan, site, lead=lead)  # type: ignore[arg-type]
        return replace(policy, anchor=f"../anchors/{site}.json") if site == ANCHORED else policy

    virtual_site.generate_policy = anchored


def _watch_training(everyone: Participants, doomed: Doomed, outside: Outside) -> None:
    """Tell the parent of each training that begins, and of what it made, and of a site that cannot be opened."""
    open_site = everyone.site

    def site(index: int) -> Site:
        name = everyone.config.federation.active[index]
        try:
            opened = open_site(index)
        except Exception as error:
            outside.tell("failed", site=name, error=f"cannot be opened: {error!r}"[:1000])
            raise

        train_unseen = opened.train

        def train(
            request: RoundRequest, adapter: Adapter, attempt: int, admitted: Collection[str] | None = None
        ) -> TrainingResult:
            outside.tell("begun", site=name, round=request.round, attempt=attempt, admitted=sorted(admitted or ()))
            with doomed.within("training"):
                trained = train_unseen(request, adapter, attempt, admitted)
            outside.tell("trained", site=name, noise=trained.adapter.digest())
            return trained

        opened.train = train  # type: ignore[method-assign]
        return opened

    everyone.site = site  # type: ignore[method-assign]


def _watch_replies(setting: Setting, doomed: Doomed, outside: Outside, late: Callable[[], None] | None) -> None:
    """Show each request and reply to the observer, who asks for the round again, once rightly and once wrongly.

    Args:
        late: what a ledger in a wrong order still has to write; such a ledger is asked once.
    """

    def seen(site: Site, signed: Signed, adapter: Adapter) -> Reply:
        with doomed.within("answer"):
            reply = answer(site, signed, adapter)
        with doomed.within("reply"):
            outside.reply(signed, reply)
        return reply

    def watched(site: Site, signed: Signed, adapter: Adapter) -> Reply:
        outside.request(signed, adapter)
        reply = seen(site, signed, adapter)
        if late is not None:
            late()
        else:
            seen(site, signed, adapter)
            seen(site, *_other_request(setting, signed, adapter))
        return reply

    client.answer = watched


def _other_request(setting: Setting, signed: Signed, adapter: Adapter) -> tuple[Signed, Adapter]:
    """The same round from another adapter: would it be trained, one charge would buy two looks at the records."""
    other = Adapter({name: value + 1 for name, value in adapter.tensors.items()})
    request = replace(RoundRequest.from_signed(signed), adapter_digest=other.digest())
    return request.sign_with(setting.everyone.sites.lead_key()), other
