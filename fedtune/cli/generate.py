"""`fedtune generate`: predictions and generated texts of a finished run, for a prompt or a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated

from fedtune.cli import finished_run as runs
from fedtune.cli.command import AsJson, Option
from fedtune.cli.finished_run import Adapters, Columns, Device, MaxNewTokens, Run, Seed, Temperature, TopP
from fedtune.data.records import Record
from fedtune.evaluation.spec import WritingSpec
from fedtune.show.terminal_tables import print_json
from fedtune.spec import ConfigError


def generate(
    run: Run,
    prompt: Annotated[str | None, Option("the prompt to answer", metavar="TEXT")] = None,
    file: Annotated[str | None, Option("prompts, one per line (.txt), or records with the run's columns")] = None,
    columns: Columns = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    adapter: Adapters = (),
    base: Annotated[bool, Option("also generate with the base model")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Print a finished run's output for a prompt: generated text, labels or a number.

      fedtune generate runs/chats --prompt "Where is my parcel?"
      fedtune generate runs/chats --file prompts.txt --json > answers.jsonl
      fedtune generate runs/chats --prompt "Hello" --base --adapter other=runs/other

    Decoding is greedy unless --temperature is above 0. With --file, the output has one line per record; with --json,
    one JSON object per record.
    """
    spec = WritingSpec(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config, own = runs.load_finished_run(run, device=device, columns=columns)
    task = config.bound_task
    if not task.answers:
        raise ConfigError("task", config.task, "has no output for a prompt: use fedtune evaluate for its scores")
    if spec.temperature > 0 and not task.predicts_tokens:
        raise ConfigError("--temperature", spec.temperature, "requires a task that generates text; this one does not")
    folders = runs.collect_adapters(run, own, adapter)
    if prompt is not None and file is not None:
        raise ConfigError("--prompt", prompt, "cannot be combined with --file")
    if prompt is None and file is None:
        raise ConfigError("--prompt", "", "is missing: give --prompt or --file")
    if columns is not None and file is None:
        raise ConfigError("--columns", columns, "requires --file, whose columns it names")
    runs.warn_about_fixed_prompt(config)
    if prompt is None:
        from fedtune.sites.run_records import read_prompts  # torch takes seconds to import

        with runs.suggest_columns_option():
            records = read_prompts(config, str(file), key="--file")
    else:
        records = [Record(task.prompt_fields(prompt, config.data, at="--prompt"))]
    from fedtune.runs.saved_model import BASE, SavedModel

    saved = SavedModel(config, folders)
    names = [name for name in saved.names if base or name != BASE]
    # Encode all prompts before printing, so that an invalid record leaves no partial output.
    writes = task.predicts_tokens
    places = [one.at("prompt") if one.file else "--prompt" for one in records]
    ids = [saved.encode_prompt(one.fields, at=at) for one, at in zip(records, places, strict=True) if writes]

    def iter_answers(place: int, name: str) -> Iterator[str]:
        saved.use_adapter(name)
        if writes:
            yield from saved.generate_answer(ids[place], spec)
        else:
            yield saved.answer_record(records[place])[0]

    def answer_record(place: int) -> dict[str, object]:
        """Return the outputs for a record by adapter: generated texts, or predictions."""
        if writes:
            return {name: "".join(iter_answers(place, name)) for name in names}
        answers = {}
        for name in names:
            saved.use_adapter(name)
            answers[name] = saved.answer_record(records[place])[1]
        return answers

    if prompt is not None and as_json:
        print_json({"run": str(run), "prompt": prompt, "answers": answer_record(0)})
    elif prompt is not None:
        for name in names:
            sys.stdout.write(f"[{name}]\n" if len(names) > 1 else "")
            runs.print_stream(iter_answers(0, name))
    else:
        for place, record in enumerate(records):
            if as_json:
                line = {"line": record.line, "fields": dict(record.fields), "answers": answer_record(place)}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            for name in [] if as_json else names:
                text = runs.strip_control_characters("".join(iter_answers(place, name))).replace("\n", "\\n")
                sys.stdout.write(f"{name}\t{text}\n" if len(names) > 1 else f"{text}\n")
            sys.stdout.flush()
