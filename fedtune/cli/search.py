"""`fedtune search`: trials of several settings, whose whole price is known and has room before the first one begins.

`fedtune.privacy.selection` says what the price is, and why.  Scores on the lead's own validation file pick, and guide
TPE: they cost nothing, since that file holds no record of a site.

A search keeps one ledger for each simulated site over all its trials.  Without `runtime.sites_dir` the sites are new,
with a budget that is the search's price.  The same command again goes on where it stopped: it draws the same trials,
finds those that are finished, and resumes the one that is not, so nothing is charged twice.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli import search_trials as propose
from fedtune.cli.command import AsJson, Option, Overrides, single
from fedtune.cli.search_price import check_trials, price_section, promise
from fedtune.cli.search_trials import Listed, Proposer, Searched, Values, split_searched
from fedtune.cli.shown_run import run_simulation
from fedtune.cli.sweep import SweptRun, as_json_table, best_of, ran, row_of, score_of, show_table, write_table
from fedtune.config import RunConfig, saved_config
from fedtune.evaluation.bootstrap import direction
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy import accountant
from fedtune.privacy.durable import write_durably
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import SearchPrice, Selection, price_of
from fedtune.show.sections import SCHEMA_VERSION, json_text, print_json, say, show
from fedtune.sites.session import Session
from fedtune.spec import NOT_GIVEN, ConfigError, FedtuneError, RefusedError
from fedtune.words import counted, jsonable

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.sites.virtual_site import VirtualSites

Method = Literal["grid", "random", "tpe"]
_NOT_SEARCHED = ("name", "resume", "tracking", "runtime", "report", "cost")
"""Settings that change nothing of what is learnt."""
_FILE = "search.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A search as it was asked for.

    Attributes:
        fixed: the overrides that all trials have in common.
        asked: the run that these give.
        searched: the settings that trials differ in.
        trials: how many were asked for; None: as many as a grid has.
        number: of trials.
    """

    fixed: tuple[str, ...]
    asked: RunConfig
    searched: tuple[Searched, ...]
    method: Method
    trials: int | None
    number: int = 0

    @property
    def folder(self) -> Path:
        """Of the search: its trials' folders, its sites' and its files lie in it."""
        return Path(self.asked.tracking.output_dir) / self.asked.name

    @property
    def names(self) -> list[str]:
        """Of the trials."""
        return [f"{self.asked.name}-trial-{n + 1:0{len(str(self.number))}}" for n in range(self.number)]

    def identity(self) -> dict[str, Any]:
        """What makes it this search and no other, as plain JSON."""
        kept = {"method": self.method, "trials": self.trials}
        return dict(json.loads(json.dumps(kept | {"searched": [*map(asdict, self.searched)]}))) | {
            "settings": self.asked.digest()
        }

    def trial(self, name: str, values: Values) -> RunConfig:
        """One trial's configuration.

        Raises:
            ConfigError: its settings do not go together.
        """
        sites = self.asked.runtime.sites_dir or str(RunFolder(self.folder).sites)
        places = {"name": name, "tracking.output_dir": str(self.folder), "runtime.sites_dir": sites}
        return compose_run([*self.fixed, *(f"{key}={value}" for key, value in values.items())], changed=places)


def search(
    overrides: Overrides = (),
    method: Annotated[Method, Option("every combination, independent draws, or draws after earlier scores")] = "random",
    trials: Annotated[int | None, Option("how many runs (a grid has as many as it has)", metavar="K")] = None,
    as_json: AsJson = False,
) -> None:
    """Try several settings on this machine, and pick the run with the best score on data.validation_file.

    Settings with several values are searched: values with commas, interval(LOW,HIGH), log(LOW,HIGH) for numbers that
    are drawn by their logarithm, int(...) of these for whole numbers. Others are those of `fedtune simulate`:
      fedtune search experiment=banks_intents name=s training.learning_rate='log(0.001,0.1)' --trials 8
      fedtune search experiment=banks_intents name=s lora.rank=4,8 lora.alpha=8,16 --method grid
      fedtune search experiment=banks_intents name=s training.learning_rate='log(0.001,0.1)' --trials 8 --method tpe
    Every trial is charged to the same ledgers. The price of all of them is told before the first, and where a site of
    runtime.sites_dir has no room for it, nothing begins (fedtune plan --trials 8 tells the price alone). The same
    command again goes on where it stopped. docs/search.md says what is promised.
    """
    console = Console(stderr=as_json)
    prepared = prepared_for(asked_for(overrides, method, trials=trials))
    show(console, [price_section(prepared.price, seeded_noise=prepared.search.asked.runtime.seeded_noise)])
    check_room(prepared)
    _note(prepared)
    rows: list[SweptRun] = []
    path, again = prepared.search.folder / "trials.csv", _again(overrides, prepared.search)
    try:
        with Session() as session:
            for row in _trials(prepared, console, again=again, session=session):
                rows.append(row)
                write_table(path, rows, best=best_of(rows, fewest=1))
    finally:
        best = best_of(rows, fewest=1)
        if as_json:
            print_json(as_json_table(path, rows, best=best) | {"price": jsonable(prepared.price)})
        elif rows:
            show_table(console, path, rows, best=best, again=again)
    if best is not None:
        _pick(prepared, best)
        say(_picked_by(prepared, best), console=console)
        return
    say("Nothing is picked: no trial has a score.", console=console)
    for row in rows:
        if row.error is not None:
            raise row.error


def asked_for(overrides: Sequence[str], method: Method, *, trials: int | None) -> Search:
    """The search that was asked for.

    Raises:
        ConfigError: an option or a setting does not go with a search.
    """
    if method == "grid" and trials is not None:
        raise ConfigError("--trials", NOT_GIVEN, "does not go with --method grid")
    if method != "grid" and trials is None:
        raise ConfigError("--trials", NOT_GIVEN, "must be given")
    if trials is not None:
        check_trials(trials)
    fixed, searched = split_searched(overrides)
    if not searched:
        raise ConfigError("KEY=VALUE", NOT_GIVEN, "must give some setting several values, as in lora.rank=4,8")
    for one in searched:
        if one.key.split(".")[0] in _NOT_SEARCHED:
            raise ConfigError(one.key, NOT_GIVEN, "must have one value in a search: it changes nothing that is learnt")
    asked = compose_run(fixed)
    _check_searchable(asked)
    return Search(fixed=tuple(fixed), asked=asked, searched=searched, method=method, trials=trials)


def _check_searchable(asked: RunConfig) -> None:
    if asked.runtime.kind == "deployment":
        bound = "is for real sites, which decide about each run: search on public data, or in a simulation"
        raise ConfigError("runtime", "deployment", bound)
    if asked.resume is not None:
        raise ConfigError("resume", asked.resume, "does not go with a search, which goes on by itself under one name")
    if asked.may_be_fitted:
        bound = "must be stop in a search, whose price is fixed before the first trial"
        raise ConfigError("federation.if_over_budget", asked.federation.if_over_budget, bound)
    from fedtune.runs.data_notes import check_decides

    check_decides(asked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A search of which everything is known that can be known before its first trial.

    Attributes:
        proposer: says what each trial tries.
        shapes: trials as they are known, or else what they may look like.
        plans: of all trials.
    """

    search: Search
    proposer: Proposer
    shapes: tuple[RunConfig, ...]
    plans: tuple[Plan, ...]
    price: SearchPrice


def prepared_for(search: Search) -> Prepared:
    """Draw what is to be drawn, look at every trial that is known by now, and find the price.

    Raises:
        ConfigError: a trial's settings are wrong, or trials cannot be compared or paid for together.
    """
    _check_name(search)
    if search.method == "tpe" and search.trials is not None:
        shapes = tuple(search.trial("shape", values) for values in propose.ends(search.searched))
        _check_alike(search, shapes)
        search = replace(search, number=search.trials)
        proposer: Proposer = propose.Tpe(search.searched, seed=str(search.asked.seed), number=search.number)
        plans = (_one_plan(search, shapes),) * search.number
    else:
        search, proposer, shapes = _listed(search)
        _check_alike(search, shapes)
        plans = tuple(shape.plan() for shape in shapes)
    return Prepared(search=search, proposer=proposer, shapes=shapes, plans=plans, price=price_of(plans))


def _listed(search: Search) -> tuple[Search, Listed, tuple[RunConfig, ...]]:
    """The search with all its trials, where none depends on another's score."""
    if search.trials is None:
        proposer = propose.grid(search.searched)
    else:
        proposer = propose.at_random(search.searched, seed=str(search.asked.seed), number=search.trials)
    search = replace(search, number=len(proposer.trials))
    trials = zip(search.names, proposer.trials, strict=True)
    return search, proposer, tuple(search.trial(name, values) for name, values in trials)


def _check_alike(search: Search, shapes: Sequence[RunConfig]) -> None:
    """Check that scores of these trials can be compared, and that the same ledgers can pay for them.

    Raises:
        ConfigError: they differ in what they must have in common.
    """
    keys = ", ".join(one.key for one in search.searched)
    first, *others = [(_dealt(one), one.privacy.delta, one.privacy.private) for one in shapes]
    for dealt, delta, private in others:
        for key, value in dealt.items():
            if value != first[0][key]:
                bound = "must be the same in all trials: the sites' records are dealt out by it once"
                raise ConfigError(key, value, bound)
        if delta != first[1]:
            raise ConfigError("privacy.delta", delta, "must be the same in all trials: a ledger has one delta")
        if private != first[2]:
            raise ConfigError(
                "privacy", "none", "must be so in all trials or in none: without noise nothing is bounded"
            )
    if len({SweptRun(config=one, folder=search.folder, values={}).compared_on for one in shapes}) > 1:
        bound = "must leave the task and the validation records as they are, or scores cannot be compared"
        raise ConfigError("KEY=VALUE", keys, bound)


def _dealt(config: RunConfig) -> dict[str, Any]:
    from fedtune.sites.virtual_site import dealt_out  # torch takes seconds to import

    return dealt_out(config) | {"federation.participants": list(config.federation.active)}


def _one_plan(search: Search, shapes: Sequence[RunConfig]) -> Plan:
    """The plan that all trials have, where it is not known what they will try.

    Raises:
        ConfigError: a searched setting decides what a trial costs.
    """
    first, *others = propose.ends(search.searched)
    plan = shapes[0].plan()
    for values, shape in zip(others, shapes[1:], strict=True):
        if shape.plan() != plan:
            key = ", ".join(key for key, value in values.items() if value != first[key])
            bound = "decides what a trial costs, which --method tpe must know first: search it at random or by grid"
            raise ConfigError(key, NOT_GIVEN, bound)
    return plan


def _check_name(search: Search) -> None:
    """Check that the search's folder is new, or its own.

    Raises:
        ConfigError: it belongs to something else.
    """
    if not search.folder.exists() or not any(search.folder.iterdir()):
        return
    path, name = search.folder / _FILE, search.asked.name
    try:
        same = json.loads(path.read_bytes())["search"] == search.identity()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError("name", name, f"is taken: {search.folder} holds no search; choose another") from None
    if not same:
        bound = f"is taken: {path} is of a search with other settings; choose another"
        raise ConfigError("name", name, bound)


def _note(prepared: Prepared, **more: Any) -> None:
    """Note the search before its first trial, so that nothing else takes its folder."""
    search = prepared.search
    about = {"schema_version": SCHEMA_VERSION, "search": search.identity(), "price": jsonable(prepared.price)}
    try:
        search.folder.mkdir(parents=True, exist_ok=True)
        write_durably(search.folder / _FILE, json_text(about | more).encode())
    except OSError as error:
        bound = f"must be a folder to write {search.asked.name} into ({error.strerror})"
        raise ConfigError("tracking.output_dir", search.asked.tracking.output_dir, bound) from None


def _sites(config: RunConfig, prepared: Prepared) -> VirtualSites:
    from fedtune.sites.virtual_site import VirtualSites

    return VirtualSites.of(config, prepared.search.folder, config.plan())


def check_room(prepared: Prepared) -> None:
    """Check that the sites which were there before the search have room for all of it.

    Raises:
        RefusedError: one has not.
    """
    search, shapes = prepared.search, prepared.shapes
    if search.asked.runtime.sites_dir is None:
        return
    sites = _sites(shapes[0], prepared)
    sites.check_there()  # before anything is written there
    lead = sites.lead_key().public
    known = {shape.name: shape for shape in shapes}
    runs = []
    for name in search.names:
        folder = search.folder / name
        begun = RunFolder(folder).config.is_file()
        config = saved_config(folder) if begun else known.get(name) or replace(shapes[0], name=name)
        runs.append(config.proposal(lead=lead, plan=config.plan()))
    others = [one.proposal(lead=lead, plan=one.plan()) for one in shapes]
    sites.check_room(runs, asked=f"--trials = {search.number}", shapes=others)


def _trials(prepared: Prepared, console: Console, *, again: str, session: Session) -> Iterator[SweptRun]:
    """Each trial after it was run, or found finished; the last one where an error ends the search."""
    from fedtune.sites.virtual_site import budget_for

    search, proposer, spent = prepared.search, prepared.proposer, list[Plan]()
    within = budget_for(prepared.plans) if search.asked.runtime.sites_dir is None else None
    for place, name in enumerate(search.names):
        values = proposer.ask(place)
        row = row_of(search.trial(name, values), values)
        if row.config.plan() not in prepared.plans:
            raise ConfigError("KEY=VALUE", ", ".join(values), "decide together what a trial costs: search them by grid")
        if not row.earlier:
            tried = ", ".join(f"{key}={value}" for key, value in values.items())
            say(f"\ntrial {place + 1} of {search.number}: {tried}", style="bold", console=console)
            if within is not None:
                _sites(row.config, prepared).allow(within=within)
            row = ran(row, console, run=lambda *run: run_simulation(*run, again=again, session=session))
        if not isinstance(row.error, RefusedError):  # a refused trial is charged to nobody
            spent.append(row.config.plan())
        charged = [plan.whole for plan in spent]
        yield replace(row, together=accountant.epsilon_pld(charged, prepared.price.delta) if charged else 0.0)
        if row.error is not None and (row.can_go_on or not isinstance(row.error, FedtuneError)):
            raise row.error
        score = score_of(row)
        proposer.tell(None if score is None else direction(row.judged_by) * score)


def _pick(prepared: Prepared, best: SweptRun) -> None:
    """Note which run was picked, and say so in its report and on its model's card."""
    search = prepared.search
    selection = Selection.of(
        prepared.price,
        prepared.plans,
        search=search.asked.name,
        method=search.method,
        judged_by=best.judged_by,
        score=score_of(best),
    )
    write_durably(RunFolder(best.folder).selection, json_text(asdict(selection)).encode())
    from fedtune.report.model_card import write_card
    from fedtune.report.page.render import write_report

    write_card(best.folder, write_report(best.folder, language=best.config.report.language))
    _note(prepared, picked=best.folder.name, judged_by=best.judged_by, score=score_of(best))


def _picked_by(prepared: Prepared, best: SweptRun) -> str:
    score = score_of(best)
    return (
        f"Picked by validation {best.judged_by} ({score:.3f}) out of {counted(prepared.search.number, 'trial')}; "
        f"its report says so. {promise(prepared.price)}"
    )


def _again(overrides: Sequence[str], search: Search) -> str:
    """The command that goes on with this search."""
    named = [word for word in overrides if not word.startswith("name=")]
    options = [] if search.trials is None else [f"--trials={search.trials}"]
    return shlex.join(["fedtune", "search", *named, f"name={search.asked.name}", f"--method={search.method}", *options])


app = single(search)
