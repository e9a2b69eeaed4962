"""Inspect and clean data files before a run.

  fedtune data init tickets.csv            detect task and columns, and write the experiment tickets.yaml
  fedtune data check tickets.yaml          report errors and unusual records
  fedtune data clean tickets.yaml --out kept.jsonl   write a new file without bad records
  fedtune data codes tickets.csv --lengths 15,60 --out coded.jsonl   write a new file with columns for prompts
  fedtune data copies made.jsonl tickets.csv         find synthetic texts that repeat your own records

The results stay on this machine. Runs use them only if you pass them a file that was written here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from fedtune.api.compose import compose_run
from fedtune.api.config_groups import list_options
from fedtune.cli import data_sections
from fedtune.cli.command import Argument, AsJson, Option, command, group, print_answer
from fedtune.cli.finished_run import parse_column_roles, suggest_columns_option
from fedtune.codec import require
from fedtune.config import RunConfig
from fedtune.data.bad_rows import Faults, SkippedRows
from fedtune.data.features import check_range
from fedtune.data.formats import detect_format
from fedtune.data.records import Record, build_empty_file_error, iter_records, iter_usable_records, resolve_file
from fedtune.data.spec import SITE
from fedtune.data.values import is_free_text
from fedtune.extras import require_extra
from fedtune.lab.preparation import experiment_writer
from fedtune.lab.preparation.check_data import check as examine
from fedtune.lab.preparation.clean import RULES, Cleaning, Coding
from fedtune.lab.preparation.clean import clean as write_clean
from fedtune.lab.preparation.detect import Form, detect_columns
from fedtune.lab.preparation.detected_file import KINDS, OPTIONS, DetectedFile
from fedtune.lab.preparation.duplicates import compare_records
from fedtune.lab.preparation.readers import load_reader
from fedtune.model.source import resolve_model
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.privacy.policy_file import read_policy
from fedtune.show.new_files import open_new_streams, translate_os_errors, write_new_files
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, say, show, to_json_text, write_file
from fedtune.sites.run_records import hash_file, require_no_card
from fedtune.spec import ConfigError, check_one_of, expand_home
from fedtune.tasks.registry import TASKS
from fedtune.version import find_shipped_folders

app = group(__doc__)
Experiment = Annotated[
    tuple[str, ...], Argument("EXPERIMENT [KEY=VALUE]", help="an experiment's file or name, and settings to change")
]


@command(app, "detect a file's columns, and write an experiment for it")
def init(
    file: Annotated[
        Path, Argument("FILE", help=".csv .tsv .jsonl .json .parquet .conll .pubtator .bioc, or a folder of a data set")
    ],
    out: Annotated[
        Path | None, Option(metavar="FILE.yaml", help="output file (default: FILE's name in this folder)")
    ] = None,
    sites: Annotated[
        int | None, Option(metavar="N", help="number of simulated sites (default: 2 to 4, by the number of records)")
    ] = None,
    model: Annotated[str | None, Option("a name from conf/model, or a folder with a model")] = None,
    force: Annotated[bool, Option("overwrite an existing experiment")] = False,
    unit: Annotated[Literal["user", "record"], Option("privacy unit if a column identifies people")] = "user",
    table: Annotated[bool, Option("predict from numbers and categories instead of a text or an image")] = False,
    texts: Annotated[bool, Option("predict from a text")] = False,
    ranges: Annotated[str | None, Option("LOW,HIGH for all numbers, or a file by column", metavar="RANGE")] = None,
    **columns: Annotated[str | None, Option(names=(*OPTIONS,), metavar="COLUMN")],
) -> None:
    """Detect the task and columns of a data file, and write an experiment file with comments.

    fedtune data init tickets.csv                        write tickets.yaml, and print the next command
    fedtune data init posts.csv --text body --label team  classification by these columns
    fedtune data init posts.csv --text body              a language model on these texts
    fedtune data init qa.csv --prompt q --completion a   a language model on prompts and completions
    fedtune data init p.csv --text a --other b --score s  embeddings of text pairs with similarity scores
    fedtune data init visits.csv --user patient          user-level privacy: one unit per patient
    fedtune data init tweets.csv --site airline          a simulation with one site per value of this column
    fedtune data init nli.csv --text a --text-pair b      classification of text pairs, such as entailment
    fedtune data init labs.csv --label diagnosis         classification of a table with numbers and categories
    fedtune data init labs.csv --ranges=-5,5             a table with one public range for all numbers
    fedtune data init labs.csv --table                   treat the file as a table (--texts: as texts)
    fedtune data init scans.csv --model FOLDER           classification of images with a vision transformer
    fedtune data init trial.csv --time months --event died  survival analysis of a table, text or image

    Columns without an option are detected from names and values. The output lists the option that overrides each.
    """
    target = out or Path(f"{experiment_writer.derive_run_name(Path(file.name.split('.')[0]))}.yaml")
    chosen = {option: name for option in OPTIONS if (name := columns[option.replace("-", "_")]) is not None}
    if "user" in chosen and unit == "record":
        raise ConfigError("--user", chosen["user"], "identifies people, which --unit record ignores")
    if table and texts:
        raise ConfigError("--table", "", "cannot be combined with --texts")
    form: Form | None = "table" if table else "texts" if texts else None
    found = detect_columns(file, chosen, by_person=unit == "user", form=form)
    if not str(target).isprintable():
        raise ConfigError("--out", str(target), "must be a name without control characters")
    _require_new_file(target, ".yaml", ".yml", force=force)
    if sites is not None and (sites < 1 or "site" in chosen):
        bound = "must be at least 1; with --site, omit it, because the column determines the number"
        raise ConfigError("--sites", sites, bound)
    base = KINDS[found.kind][1]
    if base == "own_images" and model is None:
        raise ConfigError("--model", "", "must be a folder with a vision transformer (see docs/other_tasks.md)")
    config, spec = _compose_with_model(base, model)
    reader = load_reader(config.data, spec, key="--model", other="--model")
    plan = experiment_writer.plan_experiment(found, reader, config, sites=sites)
    if sites is not None and sites > plan.units:
        raise ConfigError("--sites", sites, f"must be at most {plan.units}, the number of records or people")
    named, path = (model, None) if spec is config.model else (None, model)
    declared = _parse_ranges(ranges, found) if ranges is not None else {}
    plan = replace(plan, model=named, model_path=path, ranges=declared)
    write_file(target, experiment_writer.render_experiment(found, plan, file=target), option="--out")
    try:  # a label or column name may not be valid in a settings file
        compose_run([f"experiment={target.absolute()}", *experiment_writer.fill_overrides(found)])
    except ConfigError:
        target.unlink()
        raise
    to_know = Section(title="Notes", notes=tuple(experiment_writer.list_notes(found, plan)))
    about_input = data_sections.build_input_section(found, plan, spec.path)
    show([*data_sections.build_file_sections(found, plan), about_input, to_know])
    say(f"\nWrote {target}. Read it, then run:")
    say(f"  {experiment_writer.format_next_command(target)}", style="bold")


def _parse_ranges(given: str, found: DetectedFile) -> dict[str, tuple[float, float]]:
    """Parse the declared range of each numeric column: LOW,HIGH for all columns, or a file with one column per row."""
    numbers = [name for name in found.features if not found.columns[name].is_category]
    bound = "must be LOW,HIGH for a table's numbers, or a file with the columns column, low and high"
    lines = [(name, *given.split(",")) for name in numbers]
    if os.path.exists(path := expand_home(given, key="--ranges")):
        roles = ("column", "low", "high")
        records = iter_records(Path(path), dict(zip(roles, roles, strict=True)))
        lines = [tuple(one.fields[role] for role in roles) for one in records if one.fields["column"] in numbers]
    try:
        declared = {name: (float(low), float(high)) for name, low, high in lines}
    except ValueError:
        declared = {}
    if not declared:
        raise ConfigError("--ranges", given, bound)
    for pair in declared.values():
        check_range("--ranges", pair)
    return declared


@command(app, "report errors and unusual records of an experiment")
def check(
    settings: Experiment,
    policy: Annotated[Path | None, Option("check this site's own data file", ("--site",), metavar="site.toml")] = None,
    as_json: AsJson = False,
) -> None:
    """Check all records of an experiment as a run would read them, and report errors and unusual records.

    fedtune data check tickets.yaml                             the files in tickets.yaml
    fedtune data check tickets.yaml data.max_length=64          with an override
    fedtune data check tickets.yaml --site site.toml            a real site's own file, as in this run

    Reports errors, truncated records, records without training signal, duplicates, near-duplicates, test records in
    the training data, labels, lengths, likely personal identifiers, damaged encodings and declared sizes. The output
    contains counts and line numbers, never a record's text. No file is changed.
    """
    config = _compose_experiment(settings, policy)
    reader = load_reader(config.data, config.model, key="model.path", other="model=NAME")
    checked = examine(config, reader)
    sections = [*data_sections.build_check_sections(checked), Section(title="Notes", notes=data_sections.ABOUT)]
    print_answer({"checked": checked}, sections, as_json=as_json, heading=f"Data of {config.name}")


@command(app, "write a cleaned copy of an experiment's records")
def clean(
    settings: Experiment,
    out: Annotated[Path, Option(metavar="FILE.jsonl", help="output file; must not exist yet")],
    drop: Annotated[
        str, Option(metavar="RULE,...", help=f"kinds of rows to drop: {', '.join(RULES)}")
    ] = "empty,unusable",
    mask: Annotated[Literal["nothing", "personal"], Option("kinds of identifiers to mask")] = "nothing",
    of: Annotated[Literal["train", "validation", "test"], Option("data file of the experiment to clean")] = "train",
) -> None:
    """Copy an experiment's data file without bad rows, or with personal identifiers masked.

    fedtune data clean tickets.yaml --out kept.jsonl                         drop unusable rows
    fedtune data clean tickets.yaml --out kept.jsonl --drop unusable,duplicates,near-duplicates
    fedtune data clean tickets.yaml --out kept.jsonl --mask personal         identifiers become [e-mail], [IBAN], ...
    fedtune simulate experiment=./tickets.yaml data.train_file=kept.jsonl    run on the new file

    The original file is not changed. Deduplication makes records depend on each other, because a record is dropped if
    an earlier record equals it. Clean the data before you declare its size and before the first run. The guarantee
    then covers the records of the new file, not the dropped records.
    """
    config, key = _compose_experiment(settings, None), f"data.{of}_file"
    if (name := getattr(config.data, f"{of}_file")) is None:
        raise ConfigError(key, None, f"is missing, but --of {of} requires it")
    if SITE in name:
        bound = f"must be one file: replace {SITE} with a site's name, and set data.partition.kind=iid"
        raise ConfigError(key, name, bound)
    source = resolve_file(name, find_shipped_folders(), key=key)
    require_no_card(name, key=key, kind="a site's own")
    _require_new_file(out, ".jsonl")
    rules = [rule.strip() for rule in drop.split(",") if rule.strip()]
    for rule in rules:
        check_one_of("--drop", rule, RULES)
    if "near-duplicates" in rules:
        require_extra("--drop", "near-duplicates", "data", "datasketch")
    task, unit = config.bound_task, config.privacy.unit
    columns = task.columns(config.data, partition=of == "train", unit=unit)
    fault, named = task.record_validator(config.data), config.data.columns
    cleaning = Cleaning(columns, fault, drop=rules, mask=mask == "personal", named=named)
    with open_new_streams(("--out", out)) as (stream,), translate_os_errors(out, "--out"):
        done = write_clean(source, stream, cleaning)
    show(data_sections.build_clean_sections(done))
    say(f"\nWrote {out}. Use it with data.{of}_file={out}.")


@command(app, "write a copy with columns for topics and lengths")
def codes(
    file: Annotated[str, Argument("FILE", help="a file of the site's own records")],
    out: Annotated[Path, Option(metavar="FILE.jsonl", help="output file; must not exist yet")],
    topics: Annotated[str | None, Option("public texts, one per row, in the column topic", metavar="FILE")] = None,
    model: Annotated[str, Option("public embedding model: a name from conf/model, or a model folder")] = "minilm",
    lengths: Annotated[
        str | None, Option("the maximum number of words of each class, except the last", metavar="WORDS,...")
    ] = None,
    columns: Annotated[str, Option("roles of the texts, each with its column", metavar="ROLES")] = "{text: text}",
) -> None:
    """Copy a site's file and add topic and length columns, which serve as prompts for tuning a language model.

    fedtune data codes tickets.csv --topics topics.csv --out coded.jsonl    topic: the nearest topic in topics.csv
    fedtune data codes tickets.csv --lengths 15,60 --out coded.jsonl        length: up to 15 words, 16 to 60 words, ...

    A record's codes depend only on the record itself, never on other records. All sites of a run need the same topics,
    model and bounds: compare the printed hashes. See docs/using_the_result.md.
    """
    source, roles = resolve_file(file, find_shipped_folders(), key="FILE"), parse_column_roles(columns)
    require_no_card(file, key="FILE", kind="a site's own")
    if not roles or not all(map(is_free_text, roles)):
        raise ConfigError("--columns", columns, "must name only text roles")
    if topics is None and lengths is None:
        raise ConfigError("--topics", None, "is missing: give --topics or --lengths")
    bounds = [int(one[:99]) if one.isdecimal() else 0 for one in lengths.split(",")] if lengths is not None else []
    if bounds != sorted({*bounds} - {0}):
        raise ConfigError("--lengths", lengths, "must be numbers of words, at least 1 and increasing, such as 15,60")
    _require_new_file(out, ".jsonl")
    next(_iter_usable_records([(source, roles)], {}))
    same, votes, reader = dict[str, str](), None, None
    if topics is not None:
        require_no_card(topics, key="--topics")
        path = resolve_file(topics, find_shipped_folders(), key="--topics")
        each = tuple(dict.fromkeys(one.fields["text"] for one in iter_records(path, {"text": "topic"})))
        if len(each) < 2:
            raise ConfigError("--topics", topics, "must have at least two different texts in the column topic")
        from fedtune.model.base_model import hash_model  # transformers takes seconds to import

        config, spec = _compose_with_model(next(name for name, task in TASKS.items() if task.counts_units), model)
        reader = load_reader(config.data, spec, key="--model", other="--model")
        spec = replace(spec, dtype="float32")  # the same on every machine
        lora = LoraSpec(rank=1, layers=(-1,))  # untrained, so without effect; fits any model
        head = replace(config.head, label_texts=each)
        votes = replace(config.task_model(), model=spec, lora=lora, head=head, labels=each)
        same = {"topics": hash_file(path, key="--topics"), "model": hash_model(spec)}
    coding = Coding(roles, votes, reader, bounds=bounds)
    with open_new_streams(("--out", out)) as (stream,), translate_os_errors(out, "--out"):
        done = write_clean(source, stream, coding)
    show(data_sections.build_codes_sections(done, coding.codes, same))
    say(f"\nWrote {out}. It contains private records.")


@command(app, "find synthetic texts that repeat a site's own records")
def copies(
    synthetic: Annotated[str, Argument("SYNTHETIC", help="a file of synthetic records")],
    own: Annotated[tuple[str, ...], Argument("OWN", help="files of the site's own records")] = (),
    policy: Annotated[
        Path | None, Option("compare with the data sets in this site's policy", ("--site",), metavar="site.toml")
    ] = None,
    columns: Annotated[str, Option("roles of the texts, each with its column", metavar="ROLES")] = "{text: text}",
    own_columns: Annotated[str | None, Option("column names in OWN, if they differ", metavar="ROLES")] = None,
    out: Annotated[
        Path | None, Option("write all details to a new file that only you can read", metavar="FILE.json")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find synthetic records that repeat wording, near-duplicates or personal details of a site's own records.

    fedtune data copies made.jsonl tickets.csv --own-columns '{text: body}'
    fedtune data copies made.jsonl --site site.toml       files and columns as in the site's policy

    As a baseline, a sample of the site's own records is compared with the remaining records, because people use the
    same phrases. The output quotes private records without any guarantee: it must not leave the site. No file is
    changed.
    """
    roles, own_roles = parse_column_roles(columns), parse_column_roles(own_columns or columns)
    if not roles or roles.keys() != own_roles.keys() or not all(map(is_free_text, roles)):
        raise ConfigError("--columns", columns, "must name the same text roles as --own-columns")
    files = [(resolve_file(name, find_shipped_folders(), key="OWN"), own_roles) for name in own]
    if policy is not None:
        sets = (one for one in read_policy(policy).dataset if roles.keys() <= one.columns.keys())
        files += [(policy.parent / one.path, {role: one.columns[role] for role in roles}) for one in sets]
    if not files:
        raise ConfigError("OWN", "", "is missing: give files, or --site with a data set with the roles of --columns")
    if out is not None:
        _require_new_file(out)

    left_out: dict[str, SkippedRows] = {}
    made = resolve_file(synthetic, find_shipped_folders(), key="SYNTHETIC")
    records = list(_iter_usable_records([(made, roles)], left_out))
    # a smaller sample would be no baseline
    every = max(2, sum(1 for _ in _iter_usable_records(files, left_out)) // max(len(records), 1_000))
    near = compare_records(records, _iter_usable_records(files, left_out))
    drawn = [one for number, one in enumerate(_iter_usable_records(files, left_out)) if not number % every]
    rest = (one for number, one in enumerate(_iter_usable_records(files, left_out)) if number % every)
    usual = compare_records(drawn, rest)
    told = {"about": data_sections.ABOUT_COPIES, "read": left_out, "synthetic": near, "ordinary": usual}
    if out is not None:
        with write_new_files(("--out", out), mode=0o600) as texts:
            texts[out] = to_json_text({"schema_version": SCHEMA_VERSION, **told})
    print_answer(told, data_sections.build_copies_sections(near, usual, left_out), as_json=as_json)


def _iter_usable_records(
    files: Sequence[tuple[Path, Mapping[str, str]]], left_out: dict[str, SkippedRows]
) -> Iterator[Record]:
    """Yield the usable records of several files, and record the skipped rows of each file in `left_out`.

    Raises:
        DataError: a file has no usable record.
    """
    with suggest_columns_option():
        for path, its in files:
            faults, number, shared = Faults(), 0, detect_format(path) == ".json"  # rows may share a line
            for number, record in enumerate(iter_usable_records(path, its, faults=faults), 1):
                row = faults.summarize(used=number).rows if shared else record.line
                yield replace(record, file=path.name, line=row)
            if not number:
                faults.raise_if_any()
                raise build_empty_file_error(path)
            left_out[str(path)] = faults.summarize(used=number)


def _compose_experiment(settings: tuple[str, ...], site: Path | None) -> RunConfig:
    """Compose an experiment from command-line arguments, with the data files of the real site `site` if it is given."""
    if not settings:
        raise ConfigError("experiment", "", "must be a file such as tickets.yaml, or a name from conf/experiment")
    names = [word for word in settings if "=" not in word or Path(word).is_file()]
    for word in names[1:]:
        raise ConfigError("experiment", word, f"is a second experiment, after {names[0]}: give only one")
    for word in names:
        if Path(word).is_file() and Path(word).suffix not in (".yaml", ".yml"):
            bound = "must be an experiment file (*.yaml): `fedtune data init` writes one for a file of records"
            raise ConfigError("experiment", word, bound)
    config = compose_run([f"experiment={word}" if word in names else word for word in settings])
    if site is None:
        return config
    from fedtune.sites.shared_settings import derive_settings_for_own_site  # transformers takes seconds to import

    return derive_settings_for_own_site(config, read_policy(site), folder=site.parent)


def _compose_with_model(base: str, model: str | None) -> tuple[RunConfig, ModelSpec]:
    """Compose a recipe, optionally with another model: a name from conf/model, a folder or a hub id.

    Raises:
        ConfigError: the model does not exist.
    """
    names = list_options("model")
    known = model is None or model in names
    if not known and "/" not in str(model) and not (str(model).strip() and Path(str(model)).is_dir()):
        bound = f"must be one of {', '.join(names)}, or a folder with a model, or a hub id (owner/name)"
        raise ConfigError("--model", model, bound)
    left_open = experiment_writer.build_placeholder_overrides(base)
    config = compose_run([f"experiment={base}", *left_open, *([f"model={model}"] if model and known else [])])
    return config, config.model if known else resolve_model(str(model))


def _require_new_file(target: Path, *suffixes: str, force: bool = False) -> None:
    """Check in advance that `target` can be created or, with `force`, overwritten."""
    option = ", or use --force" if suffixes == (".yaml", ".yml") else ""
    is_free = not os.path.lexists(target) or (force and target.is_file())
    taken = f"already exists; choose another name with --out, or move the file away{option}"
    require("--out", str(target), not suffixes or target.suffix in suffixes, f"must end in {' or '.join(suffixes)}")
    require("--out", str(target), os.path.isdir(target.parent), "must be in an existing folder")
    require("--out", str(target), is_free, taken)
