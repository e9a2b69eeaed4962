"""`fedtune compare`: whether the shared model is better than what there is, for whom, by how much, at what price."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.api.working_folder import folder_of
from fedtune.cli.command import Argument, AsJson, Option, Output, check_output, single
from fedtune.cli.compare_sections import NO_PRIVACY, Compared, Kind, Line, scored
from fedtune.cli.finished_run import finished_run
from fedtune.cli.shown_run import run_simulation
from fedtune.cli.sweep import continued, in_one_line, result_in
from fedtune.config import RunConfig
from fedtune.data.load import shipped_folders
from fedtune.data.records import Record, column_values, resolve_file
from fedtune.data.spec import SITE
from fedtune.evaluation.bootstrap import FEWEST_UNITS
from fedtune.evaluation.spec import SMALLEST, no_test_records
from fedtune.federation.run_folder import RunFolder, run_folders_near
from fedtune.privacy.accountant import epsilon_pld, epsilon_text
from fedtune.show.sections import json_text, print_json, require_agreed, say, show, write_file
from fedtune.sites.session import Session
from fedtune.spec import NOT_GIVEN, ConfigError, check_at_least
from fedtune.words import counted

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.runs.results import RunResult

_POOLED_SITE = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One run of a comparison.

    Attributes:
        kind: who takes part.
        site: the one that trains alone.
        config: of the run; `private` where it is private.
    """

    kind: Kind
    site: str | None
    config: RunConfig

    @property
    def private(self) -> bool:
        return self.config.privacy.private

    @property
    def name(self) -> str:
        """What tables call it."""
        named = f"{self.site} alone" if self.site else self.kind
        return named if self.private else f"{named}{NO_PRIVACY}"


def compare(
    words: Annotated[
        tuple[str, ...],
        Argument("KEY=VALUE | RUN", help="settings of an experiment to run; or folders of finished runs"),
    ] = (),
    data: Annotated[str | None, Option("score on this file (default: the test records)", metavar="FILE")] = None,
    without_privacy: Annotated[
        bool, Option(names=("--without-privacy",), help="also run everything without privacy")
    ] = False,
    leave_out: Annotated[
        tuple[Literal["alone", "federated", "pooled"], ...], Option("do not run these; may be repeated")
    ] = (),
    by: Annotated[str | None, Option("also score by group: by the values of this column", metavar="COLUMN")] = None,
    smallest: Annotated[int, Option("merge groups with fewer records (users, where they are protected)")] = SMALLEST,
    generate: Annotated[int | None, Option("also write texts for the first N prompts", metavar="N")] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Compare the model before training, each site alone, the federation, and all records in one place.

      fedtune compare experiment=banks_intents name=banks              runs/banks/: one run for each, and compare.json
      fedtune compare experiment=banks_intents --without-privacy       each with and without privacy
      fedtune compare experiment=hospitals_abstracts --by label        also by group
      fedtune compare runs/a runs/b --data test.jsonl                  runs that are there already

    The same records are scored under every model. Intervals (95 %) come from drawing these records anew, the same ones
    for all models; what they do not tell apart is said in words. The same command again goes on where it stopped.
    """
    _check_options(output, smallest)
    console, folders = Console(stderr=as_json), _run_folders(words)
    if folders:
        _check_not_given(without_privacy, leave_out)
        into, lines = None, _lines_of_folders(folders)
    else:
        runs = planned(words, without_privacy=without_privacy, leave_out=leave_out)
        _check_data(runs[0].config, data, by)
        into = Path(runs[0].config.tracking.output_dir)
        options = {"--data": data, "--by": by, "--smallest": smallest, "--generate": generate, "--output": output}
        flags = ["--without-privacy"] * without_privacy + [f"--leave-out={kind}" for kind in leave_out]
        again = _again(words, into, options, flags)
        _say_price(runs, console)
        if not words:
            require_agreed("Train them now?", otherwise="nothing is trained; experiment=NAME names other records")
        try:
            with Session() as session:
                lines = _run_all(runs, console, again=again, session=session)
        except BaseException:
            say(f"Continue with: {again}", console=console)
            raise
    with Console(stderr=True).status("Scoring ..."):
        compared = scored(lines, data=data, by=by, smallest=smallest, generate=generate)
    written = _write(compared, output, into)
    if as_json:
        print_json(compared.to_json())
        return
    show(console, compared.sections())
    for path in written:
        say(f"written: {path}", console=console)


def _check_options(output: Path | None, smallest: int) -> None:
    check_output(output)
    check_at_least("--smallest", smallest, FEWEST_UNITS)


def _check_not_given(without_privacy: bool, leave_out: Sequence[Kind]) -> None:
    if without_privacy or leave_out:
        key = "--without-privacy" if without_privacy else "--leave-out"
        raise ConfigError(key, NOT_GIVEN, "goes with an experiment's settings, not with runs that are there already")


def _run_folders(words: Sequence[str]) -> list[Path]:
    """The words, where they are folders of runs; empty: they are settings.

    Raises:
        ConfigError: they are some of each, or one is neither.
    """
    folders = [word for word in words if RunFolder(Path(word)).config.is_file()]
    for word in words:
        if word not in folders and (folders or "=" not in word):
            near = run_folders_near(Path(word))
            raise ConfigError("RUN", word, f"must be a run folder; or give settings alone, as KEY=VALUE{near}")
    return [Path(word) for word in folders]


def planned(words: Sequence[str], *, without_privacy: bool, leave_out: Sequence[Kind]) -> list[Planned]:
    """The runs of a comparison over one experiment, the federation's first.

    Raises:
        ConfigError: a setting is wrong, or does not go with a comparison.
    """
    asked = compose_run(words)
    _check_comparable(asked)
    folder = Path(asked.tracking.output_dir) / asked.name
    kinds: list[tuple[Kind, str | None]] = [("federated", None)]
    kinds += [("alone", site) for site in asked.federation.names if asked.federation.num_sites > 1]
    kinds += [("pooled", None)] if asked.data.partition.kind != "file" and asked.federation.num_sites > 1 else []
    plain: list[dict[str, Any]] = [{}]
    if without_privacy and asked.privacy.private:
        without = {"privacy.mechanism": "none", "privacy.noise_multiplier": None}
        plain.append({**without, "privacy.metrics": "none", "privacy.metrics_groups": []})
    runs = []
    for changes in plain:
        for kind, site in kinds:
            suffix = "-".join(filter(None, (kind, site, "plain" if changes else "")))
            named: dict[str, Any] = {"name": f"{asked.name}-{suffix}", "tracking.output_dir": str(folder)}
            if kind != "federated":  # which alone decides whether anything is likely to be learnt
                named["training.go_on_without_signal"] = True
            config = compose_run(words, changed={**_who(asked, kind, site), **changes, **named})
            runs.append(Planned(kind=kind, site=site, config=config))
    chosen = [run for run in runs if run.kind not in leave_out]
    if not chosen:
        raise ConfigError("--leave-out", ", ".join(leave_out), "must leave something to run")
    return chosen


def _check_comparable(asked: RunConfig) -> None:
    if asked.runtime.kind == "deployment":
        raise ConfigError("runtime", "deployment", "is for real sites: no site's records can be pooled there")
    if asked.resume is not None:
        raise ConfigError("resume", asked.resume, "does not go with compare, which goes on by itself under one name")
    if asked.federation.participants:
        bound = "must be empty to compare: each site runs alone, and all of them together"
        raise ConfigError("federation.participants", list(asked.federation.participants), bound)
    if asked.runtime.sites_dir is not None:
        bound = "must be null to compare: every run would be charged to the same sites"
        raise ConfigError("runtime.sites_dir", asked.runtime.sites_dir, bound)


def _who(asked: RunConfig, kind: Kind, site: str | None) -> dict[str, Any]:
    """The settings of who takes part, and with which records."""
    alone = {"federation.min_sites": 1, "federation.enough_sites": None}
    if kind == "alone":
        return {**alone, "federation.participants": [site]}
    if kind == "federated":
        return {}
    # The partition's kind stays, and with it the columns that are read: a record's hash, which says whether it is kept
    # for the test, goes by them.
    return {
        **alone,
        "federation.num_sites": 1,
        "federation.site_names": [_POOLED_SITE],
        "data.declared_sizes": sum(asked.data.sizes(asked.federation.num_sites)),
        "data.partition.proportions": [],
        "data.partition.sites": dict.fromkeys(asked.data.partition.sites, 0),
    }


def _check_data(config: RunConfig, file: str | None, by: str | None) -> None:
    """Look at the records to be scored before the first run, as far as that takes no model."""
    data = config.data
    if file is None and data.test_file is None and not data.test_fraction:
        raise no_test_records()
    name = file or data.test_file or data.train_file
    if SITE in name:
        return
    path = resolve_file(name, shipped_folders(), key="--data" if file else "data.test_file")
    if by is not None:
        column_values([Record({}, file=str(path))], by, key="--by")


def _again(words: Sequence[str], into: Path, options: Mapping[str, object], flags: Sequence[str]) -> str:
    """The command that goes on with a comparison that was interrupted."""
    named = [word for word in words if not word.startswith("name=")]
    given = [word for key, value in options.items() if value is not None for word in (key, str(value))]
    return shlex.join(["fedtune", "compare", *named, f"name={into.name}", *given, *flags])


def _say_price(runs: Sequence[Planned], console: Console) -> None:
    plan = runs[0].config.plan()
    names, rounds = ", ".join(run.name for run in runs), counted(plan.num_rounds, "round")
    say(f"{counted(len(runs), 'run')} of {rounds}, one after the other: {names}.", console=console)
    if plan.private:
        epsilon = epsilon_text(epsilon_pld([plan.whole], plan.delta))
        said = f"Each spends epsilon {epsilon} at delta {plan.delta:g} of its records; together they spend more."
        say(said, console=console)


def _run_all(runs: Sequence[Planned], console: Console, *, again: str, session: Session) -> list[Line]:
    """Run what is not finished yet, each in a folder of its own."""
    known: list[tuple[Planned, RunConfig, Path, RunResult | None]] = []
    for run in runs:  # all of them are looked at before the first one begins
        config = continued(run.config)
        folder = folder_of(config)
        known.append((run, config, folder, result_in(folder, finished=True)))
    lines = []
    for number, (run, config, folder, earlier) in enumerate(known, start=1):
        work = partial(run_simulation, config, folder, again=again, session=session)
        result = earlier or in_one_line(console, f"{number} of {len(known)}, {run.name}", work)
        lines.append(
            Line(name=run.name, kind=run.kind, site=run.site, private=run.private, folder=folder, result=result)
        )
    return lines


def _lines_of_folders(folders: Sequence[Path]) -> list[Line]:
    lines = []
    for folder, name in zip(folders, _names(folders), strict=True):
        config, adapter = finished_run(folder)
        # A site's copy of a final adapter has no run.json beside it.
        result = result_in(adapter.parent)
        lines.append(
            Line(name=name, kind="run", site=None, private=config.privacy.private, folder=folder, result=result)
        )
    return lines


def _names(folders: Sequence[Path]) -> Iterator[str]:
    """The folders' own names, with what is above where two are alike."""
    names = [folder.absolute().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if [other.absolute() for other in folders].count(folder.absolute()) > 1:
            raise ConfigError("RUN", str(folder), "must be given once")
        yield str(folder) if names.count(name) > 1 or name == "base" else name


def _write(compared: Compared, output: Path | None, into: Path | None) -> list[Path]:
    """Write the file that was asked for, and the figures into the folder of an experiment's runs."""
    paths = [output] if output else []
    paths += [into / "compare.json"] if into else []
    for path in paths:
        write_file(path, _text(compared, path.suffix), option="--output")
    return paths


def _text(compared: Compared, suffix: str) -> str:
    if suffix == ".json":
        return json_text(compared.to_json())
    return str(compared.chart())


app = single(compare)
