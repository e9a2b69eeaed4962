"""Generation of synthetic records with a finished run's language model, for public prompts such as label names.

Guarantee: synthetic records depend only on the run's adapter, the prompts and, with votes, the adapter of the voting
run.  Every use of them is post-processing of the releases of these runs, and has no additional privacy cost.
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

from fedtune.api.experiment_file import OPEN
from fedtune.api.public import Callback, Progress, Run, ignore_progress
from fedtune.codec import require
from fedtune.data.records import Record, build_empty_file_error, iter_records, resolve_file
from fedtune.evaluation.spec import WritingSpec
from fedtune.lab.preparation.experiment_writer import escape_interpolations
from fedtune.sites.run_records import RunRecords, normalize_text, require_disjoint, require_not_generated
from fedtune.spec import ConfigError
from fedtune.tasks.registry import TASKS
from fedtune.version import find_shipped_folders

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.tasks.saved import SavedAdapter

Prompt = tuple[str, ...]  # values of the prompt's roles, in order
WRITING = WritingSpec(max_new_tokens=100, temperature=1.0, top_p=0.95, guidance=1.0)
_WORD = re.compile(r"\w+")
_DRAWS = 5  # maximum number of attempts for a record
_BEGUN = 1 / 4, 3 / 4  # range of the fraction of a text's tokens that a variation starts with
_OF_RECORDS = (
    *("dataset", "train_file", "declared_sizes", "max_length", "train_fraction", "on_bad_record"),
    *("heldout_fraction", "validation_fraction", "validation_rows", "test_fraction", "test_rows"),
)
"""Data settings that a voting run copies, so that it has the same training and held-out records."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Synthetic records, with the numbers of requested and rejected texts."""

    rows: tuple[Mapping[str, str], ...]  # column -> text, in the order of the prompts
    wanted: Mapping[Prompt, int]  # number of requested records per prompt
    # number of rejected texts by reason: "not ended" (truncated), "blank", "broken" (invalid characters), "twice"
    # (duplicate for the prompt), and "pattern" (no match)
    left_out: Mapping[str, int]


def synthesize(
    run: Run,
    prompts: str | Path | None = None,
    *,
    rows: int,
    votes: Run | None = None,
    variations_of: Sequence[Mapping[str, str]] = (),
    spec: WritingSpec = WRITING,
    pattern: str | None = None,
    own: RunRecords | None = None,
    progress: Callback = ignore_progress,
) -> Synthetic:
    """Generate synthetic records with a run's model, with the number per prompt proportional to the prompt's share.

    Guarantee: the guarantees of `run` and `votes`, by post-processing.

    Args:
        run: a finished run of a language model that completes prompts.
        prompts: a public file with one prompt per row, in the columns of the run's prompt; repeated prompts have a
            larger share.  Default: the candidates of `votes`, or the prompts of `variations_of`.
        rows: number of records.
        votes: a finished run of task votes with the prompts as candidates; its noisy votes are the prompts' shares.
        variations_of: rows that this run generated earlier; a new record has a row's prompt and starts with a part of
            the row's text.
        spec: sampling settings; the seed makes the texts reproducible on one machine, and guidance steers texts away
            from other prompts.
        pattern: a regular expression that must match each text entirely.
        own: the run's records, if already loaded, to check that the prompts are not private.
        progress: callback for progress, called in this thread.

    Returns:
        The synthetic records, with the numbers of requested and rejected texts.

    Raises:
        ValueError: a run, the prompts or a setting cannot be used; nothing was generated.
    """
    *roles, _ = columns = map_synthetic_columns(run)
    shares = _read_prompts(run, prompts, roles, own or RunRecords(run.config)) if prompts is not None else {}
    if votes is not None:
        voted: dict[Prompt, float] = {(text,): weight for text, weight in compute_vote_shares(votes).items()}
        bound = "must have the prompts as its candidates, and prompts must have a single column"
        require("votes", str(votes.folder), len(roles) == 1 and (shares or voted).keys() == voted.keys(), bound)
        for listed in (run, votes):  # a card does not list a run that generated the candidates
            found, folder = (Record({roles[0]: text}) for (text,) in voted), RunRecords(listed.config).runs_folder
            require_not_generated(found, folder, key="votes", file=str(votes.folder))
        shares = voted
    if variations_of:
        bound = "conflicts with prompts and votes: these records have their own prompts"
        require("variations_of", "records", not shares, bound)
        shares = dict(load_synthetic(variations_of, tuple(columns.values())).wanted)
    require("prompts", None, bool(shares), "is missing: records need prompts, votes or rows to vary")
    wanted = {prompt: count for prompt, count in allot_rows(shares, rows).items() if count}
    try:
        whole = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise ConfigError("pattern", pattern, f"must be a regular expression ({error})") from None
    from fedtune.runs.saved_model import SavedModel

    saved = SavedModel(run.config, {"tuned": read_adapter(run).folder})
    saved.use_adapter("tuned")
    encoded = {prompt: saved.encode_prompt(dict(zip(roles, prompt, strict=True)), at="prompts") for prompt in wanted}
    order = list(wanted)
    places = {prompt: place for place, prompt in enumerate(order)}
    texts: dict[Prompt, dict[str, None]] = {prompt: {} for prompt in wanted}  # in order, each once
    varied: dict[Prompt, dict[str, npt.NDArray[np.int32]]] = defaultdict(dict)
    fields = [{role: row[column] for role, column in columns.items()} for row in variations_of]
    for one, ids in zip(fields, saved.tokenize_answers(fields), strict=True):
        varied[tuple(one[role] for role in roles)][one["completion"]] = ids
    in_turn = {prompt: cycle(found.values()) for prompt, found in varied.items()}
    left_out, number, draws = Counter[str](), 0, np.random.default_rng(spec.seed)
    for _ in range(_DRAWS):
        missing = [prompt for prompt, count in wanted.items() for _ in range(count - len(texts[prompt]))]
        first, number = number, number + len(missing)
        begun = [next(in_turn[prompt]) for prompt in missing if variations_of]
        begun = [ids[: int(len(ids) * draws.uniform(*_BEGUN))] for ids in begun]
        against = []
        if spec.guidance > 0 and len(order) > 1:  # rotate over the other prompts, to contrast with each of them
            steps = ((prompt, 1 + at % (len(order) - 1)) for at, prompt in enumerate(missing, first))
            against = [encoded[order[(places[prompt] + step) % len(order)]] for prompt, step in steps]
        asked = [encoded[prompt] for prompt in missing]
        for place, text in saved.sample_texts(asked, spec, first=first, against=against, begun=begun):
            prompt = missing[place]
            if (fault := _find_fault(text, ChainMap[str, Any](texts[prompt], varied[prompt]), whole)) is not None:
                left_out[fault] += 1
            else:
                texts[prompt][str(text)] = None
                progress(Progress(stage="writing", done=sum(map(len, texts.values())), total=rows))
    new = ((*prompt, text) for prompt, found in texts.items() for text in found)
    written = tuple(dict(zip(columns.values(), values, strict=True)) for values in new)
    return Synthetic(rows=written, wanted=wanted, left_out=dict(left_out))


def _find_fault(text: str | None, others: Container[str], whole: re.Pattern[str] | None) -> str | None:
    if text is None:
        return "not ended"
    is_broken, is_other = "\N{REPLACEMENT CHARACTER}" in text, whole is not None and whole.fullmatch(text) is None
    faults = {"blank": not text, "broken": is_broken, "twice": text in others, "pattern": is_other}
    return next((fault for fault, found in faults.items() if found), None)


def read_adapter(run: Run) -> SavedAdapter:
    """Read a run's adapter from its folder.

    Raises:
        ConfigError: the adapter is private to a site.
    """
    from fedtune.tasks.saved import SavedAdapter

    return SavedAdapter.read(run.adapter)


def map_synthetic_columns(run: Run) -> dict[str, str]:
    """Map the roles of a synthetic record to columns: first the roles of the prompt, then the completion.

    Raises:
        ConfigError: the run's model does not complete prompts.
    """
    task, data = run.config.bound_task, run.config.data
    if not task.predicts_tokens or "prompt" not in data.columns or "completion" not in data.columns:
        bound = "must be a run of a language model with the columns prompt and completion"
        raise ConfigError("RUN", str(run.folder), bound)
    return {role: data.columns[role] for role in (*task.list_input_columns(data), "completion")}


def _read_prompts(run: Run, prompts: str | Path, roles: Sequence[str], own: RunRecords) -> dict[Prompt, float]:
    """Read the distinct prompts of a public file with their counts.

    Raises:
        ConfigError: the prompts are probably private, because they match the run's own records.
    """
    path = resolve_file(str(prompts), find_shipped_folders(), key="prompts")

    def counts(records: Iterable[Record]) -> Counter[Prompt]:
        return Counter(tuple(normalize_text(one.fields[role]) for role in roles) for one in records)

    if not (listed := list(iter_records(path, {role: run.config.data.columns[role] for role in roles}))):
        raise build_empty_file_error(path)
    require_disjoint(listed, own, key="prompts", file=str(prompts))
    found = counts(listed)
    times = Counter[Prompt]()
    for key, records in own.read_whole_files():
        times += (theirs := counts(records))
        if max(theirs.values()) > 1 and theirs <= found:  # repeated prompts reveal the private file's shares
            bound = f"must be a public list, but it contains all prompts of {key}"
            raise ConfigError("prompts", str(prompts), bound)
    if 2 * (once := sum(times[prompt] == 1 for prompt in found)) > len(found):
        bound = f"must be a public list: {once} of its {len(found)} prompts occur once in the run's own files"
        raise ConfigError("prompts", str(prompts), bound)
    return dict(Counter(tuple(one.fields[role] for role in roles) for one in listed))


def compute_vote_shares(votes: Run) -> dict[str, float]:
    """Compute each candidate's noisy share of the votes; shares are nonnegative and sum to 1.

    Raises:
        ConfigError: the run's task is not votes, or no candidate has a positive number of votes.
    """
    config = votes.config
    if not config.bound_task.counts_units:
        raise ConfigError("votes", str(votes.folder), f"must be a run of task votes, not of {config.task}")
    texts = config.head.label_texts or config.data.labels
    _, head = read_adapter(votes).tensors
    weights = head["weight"][0].clip(min=0).astype(np.float64)
    if not weights.sum() > 0:
        raise ConfigError("votes", str(votes.folder), "has no candidate with a positive noisy number of votes")
    found: Counter[str] = Counter()  # equal candidates share their votes
    for text, weight in zip(texts, (weights / weights.sum()).tolist(), strict=True):
        found[text] += weight
    return dict(found)


def allot_rows(shares: Mapping[Prompt, float], rows: int) -> dict[Prompt, int]:
    """Apportion `rows` to prompts by their shares with the largest-remainder method."""
    exact: npt.NDArray[np.float64] = np.array(list(shares.values())) * (rows / sum(shares.values()))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return dict(zip(shares, counts.tolist(), strict=True))


def load_synthetic(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Synthetic:
    """Load synthetic records from the rows of a file by `synthesize`; `columns` are from `map_synthetic_columns`."""
    prompts = Counter(tuple(row[column] for column in columns[:-1]) for row in rows)
    return Synthetic(rows=tuple(rows), wanted=prompts, left_out={})


def select_by_votes(found: Synthetic, column: str, votes: Run, *, keep: int) -> Synthetic:
    """Select the `keep` records with the most votes, in file order.

    In the run `votes`, each unit voted for the most similar text.

    Raises:
        ConfigError: there are fewer than `keep` candidates, or a text is not a candidate of the voting experiment.
    """
    weights = compute_vote_shares(votes)
    rows = [row for row in found.rows if row[column] != OPEN]  # as in the voting experiment
    bound = f"must be at most {len(rows)}, the number of candidates of the voting experiment"
    require("rows", keep, keep <= len(rows), bound)
    if missing := sum(row[column] not in weights for row in rows):
        bound = f"lacks {missing} of the texts: use the run of their voting experiment"
        raise ConfigError("votes", str(votes.folder), bound)
    order = sorted(range(len(rows)), key=lambda place: -weights[rows[place][column]])
    return replace(found, rows=tuple(rows[place] for place in sorted(order[:keep])))


def relabel(found: Synthetic, column: str, classifier: Run) -> Synthetic:
    """Relabel synthetic records with a classifier from the same sites, in the classifier's label column.

    A language model that was trained with noise often ignores its prompt.  A classifier's labels are more accurate, for
    a fraction of the epsilon (simulations/synthetic_texts).

    Raises:
        ConfigError: the run is not a single-label text classifier, or shares the text column.
    """
    config = classifier.config
    label = config.data.columns.get("label", column)
    if config.bound_task.answers != {"label"} or label == column:
        bound = f"must be a run of single-label text classification, with a label column other than {column}"
        raise ConfigError("labels", str(classifier.folder), bound)
    read_adapter(classifier)
    answers: Any = classifier.predict([row[column] for row in found.rows])
    rows = ({**row, label: answer[0]["label"]} for row, answer in zip(found.rows, answers, strict=True))
    return replace(found, rows=tuple(rows))


def render_voting_experiment(rows: Sequence[Mapping[str, str]], column: str, config: Any) -> str:
    """Render the YAML of an experiment in which a run's sites vote on these texts."""
    import yaml

    texts = list(dict.fromkeys(row[column] for row in rows if row[column] != OPEN))
    data = {key: getattr(config.data, key) for key in _OF_RECORDS} | {"partition": asdict(config.data.partition)}
    by = config.data.map_required_columns((), partition=True, unit=config.privacy.unit)
    data |= {"columns": {"text": config.data.columns["completion"], **by}}
    data |= {"labels": [f"text-{number:05}" for number in range(len(texts))]}
    names = {"num_sites": config.federation.num_sites, "site_names": list(config.federation.names)}
    settings = {"data": data, "head": {"label_texts": texts}, "federation": names}
    settings |= {"privacy": {"unit": config.privacy.unit}, "seed": config.seed}
    plain = escape_interpolations(json.loads(json.dumps(settings)))
    recipe = next(name for name, task in TASKS.items() if task.counts_units)  # conf/experiment uses the task's name
    return str(yaml.safe_dump({"defaults": [recipe, "_self_"], **plain}, sort_keys=False))


def measure_classifier_accuracy(
    records: Sequence[tuple[str, ...]], public: Sequence[tuple[str, ...]] = ()
) -> dict[str, float] | None:
    """Measure the accuracy of a bag-of-words classifier that is trained on records to predict their codes.

    A record consists of the values of its code, and a text.  Codes with a single record are skipped.  The test records
    are `public`; without public records, five-fold cross-validation is used.

    Returns:
        The fractions of test records that are classified correctly (`right`), and that have the majority code
        (`commonest`); None if the records have fewer than two codes.
    """
    times = Counter(one[:-1] for one in records)
    # By code, so that its texts are spread over the fifths.
    known = sorted((one for one in records if times[one[:-1]] > 1), key=lambda one: one[:-1])
    if len({one[:-1] for one in known}) < 2:
        return None
    rest = ([one for place, one in enumerate(known) if place % 5 != fifth] for fifth in range(5))
    parts = [(known, public)] if public else [(learned, known[fifth::5]) for fifth, learned in enumerate(rest)]
    tested, (commonest, _) = public or known, times.most_common(1)[0]
    right, often = sum(_count_correct(*part) for part in parts), sum(one[:-1] == commonest for one in tested)
    return {"right": right / len(tested), "commonest": often / len(tested)}


def _count_correct(learned: Sequence[tuple[str, ...]], tested: Sequence[tuple[str, ...]]) -> int:
    """Count correct predictions of multinomial naive Bayes with add-one smoothing (McCallum and Nigam 1998)."""
    codes = Counter(one[:-1] for one in learned)
    places = {code: place for place, code in enumerate(codes)}
    times: dict[str, Counter[int]] = defaultdict(Counter)
    for *code, text in learned:
        for word in _WORD.findall(text.lower()):
            times[word][places[tuple(code)]] += 1
    words = np.full(len(codes), max(1, len(times)))
    for found in times.values():
        words[[*found]] += [*found.values()]
    of_word = {word: ([*found], np.log1p([*found.values()])) for word, found in times.items()}
    prior, each, right = np.log([*codes.values()]), np.log(words), 0
    for *code, text in tested:
        known = [of_word[word] for word in _WORD.findall(text.lower()) if word in of_word]
        scores = prior - len(known) * each
        for at, more in known:
            scores[at] += more
        right += places.get(tuple(code)) == int(scores.argmax())
    return right
