"""Synthetic records: what a finished run's language model writes for declared codes, such as a label's name.

Guarantee: what is written follows from the run's adapter, the codes and, of a vote, from that run's adapter alone, so
it is post-processing of what those runs released: reading, sharing and training on it costs no epsilon beside theirs.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap, Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtune.api.door import Callback, Progress, Run
from fedtune.api.experiment_file import OPEN
from fedtune.data.records import Record, iter_records, resolve_file, without_records
from fedtune.evaluation.spec import WritingSpec
from fedtune.lab.preparation.starter import literal
from fedtune.sites.run_records import RunRecords, in_one_form, require_apart
from fedtune.spec import ConfigError
from fedtune.tasks.registry import TASKS
from fedtune.version import shipped_folders

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.tasks.saved import SavedAdapter

Code = tuple[str, ...]  # the values of a prompt's roles, in their order
WRITING = WritingSpec(max_new_tokens=100, temperature=1.0, top_p=0.95, guidance=1.0)
_DRAWS = 5  # how often a record that breaks the format is drawn again before it is given up
_BEGUN = 1 / 4, 3 / 4  # the share of a text's tokens that stays where it is varied: at least, and less than
_OF_RECORDS: tuple[str, ...] = ("dataset", "train_file", "declared_sizes", "max_length", "train_fraction", "unusable")
_OF_RECORDS += ("heldout_fraction", "validation_fraction", "validation_rows", "test_fraction", "test_rows")
"""Settings of a run's data by which its training records, and those that it sets aside, are a ballot's too."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Records that a model wrote."""

    rows: tuple[Mapping[str, str], ...]  # column to text, by code, in the order of the codes
    wanted: Mapping[Code, int]  # how many were asked for of each code
    # how many texts were drawn that are no record, by reason: "not ended" within the longest length, "blank",
    # "broken" characters, "twice" the same text of a code, new or varied, and "pattern": no match
    left_out: Mapping[str, int]


def synthesize(
    run: Run,
    codes: str | Path | None = None,
    *,
    rows: int,
    votes: Run | None = None,
    beginnings: Sequence[Mapping[str, str]] = (),
    spec: WritingSpec = WRITING,
    pattern: str | None = None,
    own: RunRecords | None = None,
    progress: Callback = lambda told: None,
) -> Synthetic:
    """Write records with a run's model, so many of each code as its share says.

    Args:
        run: a finished run of a language model that completes prompts.
        codes: a public file with the columns of the run's prompt, a code a row; one that stands there twice has twice
            the share.  None: the candidates of `votes`, or the codes of `beginnings`.
        rows: how many records.
        votes: a finished run of task votes whose candidates are the codes: its noisy votes are their shares.
        beginnings: rows that the run wrote, to be varied in turn: a new one has the code of one, and begins with a part
            of its text.
        spec: how texts are drawn; its seed settles them on a machine, its guidance sets them apart by code.
        pattern: a regular expression that the whole text must match.
        own: the run's records, if they are read already: the codes must not be theirs.
        progress: is called as texts come, in this thread.

    Raises:
        ValueError: a run, the codes or a setting cannot be used; nothing was written.
    """
    *roles, _ = columns = columns_of(run)
    shares = _declared(run, codes, roles, own or RunRecords(run.config)) if codes is not None else {}
    if votes is not None:
        voted: dict[Code, float] = {(text,): weight for text, weight in weights_of(votes).items()}
        if len(roles) > 1 or (shares and set(shares) != set(voted)):
            bound = "must have the codes as its candidates, each the text of the prompt's one column"
            raise ConfigError("--votes", str(votes.folder), bound)
        shares = voted
    if beginnings:
        if shares:
            raise ConfigError("--beginnings", "records", "must be given without --codes and --votes: they have codes")
        shares = dict(as_written(beginnings, tuple(columns.values())).wanted)
    if not shares:
        raise ConfigError("--codes", None, "must be given, or --votes or --beginnings: what records are written for")
    wanted = {code: count for code, count in allotted(shares, rows).items() if count}
    try:
        whole = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise ConfigError("--pattern", pattern, f"must be a regular expression ({error})") from None
    from fedtune.runs.saved_model import SavedModel

    saved = SavedModel(run.config, {"tuned": adapter_of(run).folder})
    saved.use("tuned")
    prompts = {code: saved.prompt_ids(dict(zip(roles, code, strict=True)), at="--codes") for code in wanted}
    order = list(wanted)
    places = {code: place for place, code in enumerate(order)}
    texts: dict[Code, dict[str, None]] = {code: {} for code in wanted}  # in order, each once
    varied: dict[Code, dict[str, npt.NDArray[np.int32]]] = defaultdict(dict)
    fields = [{role: row[column] for role, column in columns.items()} for row in beginnings]
    for one, ids in zip(fields, saved.answer_ids(fields), strict=True):
        varied[tuple(one[role] for role in roles)][one["completion"]] = ids
    in_turn, draws = {code: cycle(found.values()) for code, found in varied.items()}, np.random.default_rng(spec.seed)
    left_out: Counter[str] = Counter()
    number = 0
    for _ in range(_DRAWS):
        missing = [code for code, count in wanted.items() for _ in range(count - len(texts[code]))]
        first, number = number, number + len(missing)
        begun = [next(in_turn[code]) for code in missing if beginnings]
        begun = [ids[: int(len(ids) * draws.uniform(*_BEGUN))] for ids in begun]
        against = []
        if spec.guidance > 0 and len(order) > 1:  # the others in turn, so that a text is set apart from each
            turns = ((places[code] + 1 + at % (len(order) - 1)) % len(order) for at, code in enumerate(missing, first))
            against = [prompts[order[place]] for place in turns]
        asked = [prompts[code] for code in missing]
        for place, text in saved.drawn(asked, spec, first=first, against=against, begun=begun):
            code = missing[place]
            if (fault := _fault(text, ChainMap[str, Any](texts[code], varied[code]), whole)) is not None:
                left_out[fault] += 1
            else:
                texts[code][str(text)] = None
                progress(Progress(stage="writing", done=sum(map(len, texts.values())), total=rows))
    new = ((*code, text) for code, found in texts.items() for text in found)
    written = tuple(dict(zip(columns.values(), values, strict=True)) for values in new)
    return Synthetic(rows=written, wanted=wanted, left_out=dict(left_out))


def _fault(text: str | None, others: Container[str], whole: re.Pattern[str] | None) -> str | None:
    if text is None:
        return "not ended"
    is_broken, is_other = "\N{REPLACEMENT CHARACTER}" in text, whole is not None and whole.fullmatch(text) is None
    faults = {"blank": not text, "broken": is_broken, "twice": text in others, "pattern": is_other}
    return next((fault for fault, found in faults.items() if found), None)


def adapter_of(run: Run) -> SavedAdapter:
    """A run's adapter; a ConfigError says that it is private to a site."""
    from fedtune.tasks.saved import SavedAdapter

    return SavedAdapter.read(run.adapter)


def columns_of(run: Run) -> dict[str, str]:
    """Role to column of a synthetic record: those of a prompt, which name a code, and last what the model writes."""
    task, data = run.config.bound_task, run.config.data
    if not task.predicts_tokens or "prompt" not in data.columns or "completion" not in data.columns:
        bound = "must be a language model that completes prompts: data.columns names prompt and completion"
        raise ConfigError("RUN", str(run.folder), bound)
    return {role: data.columns[role] for role in (*task.asked_by(data), "completion")}


def _declared(run: Run, codes: str | Path, roles: Sequence[str], own: RunRecords) -> dict[Code, float]:
    """Each code with how often it stands in a public file; a run's own prompts mostly come once there."""
    path = resolve_file(str(codes), shipped_folders(), key="--codes")

    def counts(records: Iterable[Record]) -> Counter[Code]:
        return Counter(tuple(in_one_form(one.fields[role]) for role in roles) for one in records)

    if not (listed := list(iter_records(path, {role: run.config.data.columns[role] for role in roles}))):
        raise without_records(path)
    require_apart(listed, own, key="--codes", file=str(codes))
    found = counts(listed)
    times = Counter[Code]()
    for key, records in own.whole_files():
        times += (theirs := counts(records))
        if max(theirs.values()) > 1 and theirs <= found:  # with shares of its own: each once is a list of codes, too
            raise ConfigError("--codes", str(codes), f"must be a public list: all prompts of {key} stand in it")
    if 2 * (once := sum(times[code] == 1 for code in found)) > len(found):
        bound = f"must be a public list: {once} of its {len(found)} prompts come once in the run's own files"
        raise ConfigError("--codes", str(codes), bound)
    return dict(Counter(tuple(one.fields[role] for role in roles) for one in listed))


def weights_of(votes: Run) -> dict[str, float]:
    """Each candidate's text with its noisy share of all votes, at least 0; they add up to 1."""
    config = votes.config
    if not config.bound_task.counts_units:
        raise ConfigError("--votes", str(votes.folder), f"must be a run of task votes, not of {config.task}")
    texts = config.head.label_texts or config.data.labels
    _, head = adapter_of(votes).tensors
    weights = head["weight"][0].clip(min=0).astype(np.float64)
    if not weights.sum() > 0:
        raise ConfigError("--votes", str(votes.folder), "must have a candidate with votes: noise left none above 0")
    found: Counter[str] = Counter()  # of candidates that say the same, one has the votes of all
    for text, weight in zip(texts, (weights / weights.sum()).tolist(), strict=True):
        found[text] += weight
    return dict(found)


def allotted(shares: Mapping[Code, float], rows: int) -> dict[Code, int]:
    """`rows` by shares: whole numbers, and what is left over to the largest remainders (Hamilton's method)."""
    exact: npt.NDArray[np.float64] = np.array(list(shares.values())) * (rows / sum(shares.values()))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return dict(zip(shares, counts.tolist(), strict=True))


def as_written(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Synthetic:
    """Records from a file of `synthesize`, with the columns of `columns_of`, in their order."""
    codes = Counter(tuple(row[column] for column in columns[:-1]) for row in rows)
    return Synthetic(rows=tuple(rows), wanted=codes, left_out={})


def chosen(found: Synthetic, column: str, votes: Run, *, keep: int) -> Synthetic:
    """The `keep` records with most votes, in their order; each unit of `votes` voted for the text most like its own."""
    weights = weights_of(votes)
    rows = [row for row in found.rows if row[column] != OPEN]  # as on the ballot
    if keep > len(rows):
        raise ConfigError("--rows", keep, f"must be at most the {len(rows)} candidates on a ballot")
    if missing := sum(row[column] not in weights for row in rows):
        raise ConfigError("--votes", str(votes.folder), f"must have all texts as candidates; {missing} are none")
    order = sorted(range(len(rows)), key=lambda place: -weights[rows[place][column]])
    return replace(found, rows=tuple(rows[place] for place in sorted(order[:keep])))


def labelled(found: Synthetic, column: str, classifier: Run) -> Synthetic:
    """The records with the label that a classifier of the same sites gives their text, in its own label's column.

    A model that is tuned with noise often misses what it was asked to write of.  A classifier knows better what a text
    says, for a fraction of the epsilon (simulations/synthetic_texts).
    """
    config = classifier.config
    label = config.data.columns.get("label", column)
    if config.bound_task.answers != {"label"} or label == column:
        bound = f"must be a run whose records have a text and, in another column than {column}, one label"
        raise ConfigError("--labels", str(classifier.folder), bound)
    adapter_of(classifier)
    answers: Any = classifier.predict([row[column] for row in found.rows])
    rows = ({**row, label: answer[0]["label"]} for row, answer in zip(found.rows, answers, strict=True))
    return replace(found, rows=tuple(rows))


def ballot(rows: Sequence[Mapping[str, str]], column: str, config: Any) -> str:
    """An experiment in which the sites of a run vote on these texts, as YAML; `fedtune plan` tells its epsilon."""
    import yaml

    texts = list(dict.fromkeys(row[column] for row in rows if row[column] != OPEN))
    data = {key: getattr(config.data, key) for key in _OF_RECORDS} | {"partition": asdict(config.data.partition)}
    by = config.data.needed_columns((), partition=True, unit=config.privacy.unit)
    data |= {"columns": {"text": config.data.columns["completion"], **by}}
    data |= {"labels": [f"text-{number:05}" for number in range(len(texts))]}
    names = {"num_sites": config.federation.num_sites, "site_names": list(config.federation.names)}
    settings = {"data": data, "head": {"label_texts": texts}, "federation": names}
    settings |= {"privacy": {"unit": config.privacy.unit}, "seed": config.seed}
    plain = literal(json.loads(json.dumps(settings)))
    recipe = next(name for name, task in TASKS.items() if task.counts_units)  # conf/experiment calls it as the task
    return str(yaml.safe_dump({"defaults": [recipe, "_self_"], **plain}, sort_keys=False))
