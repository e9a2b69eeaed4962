"""Distillation of a run's tuned model (the teacher) into a smaller model (the student).

The student learns the teacher's outputs on texts that are not records of any site. No other data is read, so the run's
guarantee also holds for the student (post-processing). All of the student's weights are trained with AdamW, without
noise.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.config import RunConfig
from fedtune.data.batching import collate
from fedtune.evaluation.bootstrap import Comparison, compare_by_scores
from fedtune.export.export_formats import WRITERS, Source, create_model_folder, get_card_form
from fedtune.export.format_choice import check_int8
from fedtune.export.onnx_graphs import Served, measure_graphs, measure_model
from fedtune.formatting import format_score_name, pluralize
from fedtune.model.adapter_files import CARD
from fedtune.model.base_model import hash_model
from fedtune.model.layers import find_layer_stack
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.report import from_run
from fedtune.report.facts import RunFacts
from fedtune.report.model_card import render_card_files, render_card_text
from fedtune.report.synthetic_card import compose_losses, describe_run, format_total_loss, read_card
from fedtune.runs.environment import write_lineage_mark
from fedtune.runs.lineage import read_base_lineage
from fedtune.sites.run_records import LeadRecords, RunRecords, find_card_path, hash_file, read_prompts, require_disjoint
from fedtune.sites.shared_model import LeadData, Progress, ignore_progress, load_tokenizer_and_model
from fedtune.spec import ConfigError, DataError, check_at_least, check_at_most
from fedtune.tasks.saved import SavedAdapter, load_task_model
from fedtune.tasks.task_model import build_task_model
from fedtune.training.machine import resolve_device

HALF, FEWEST = "half", 100  # default student, and minimum number of texts
_BATCH, _RATE, _HEAD_RATE = 32, 6e-4, 6e-3


@dataclass(frozen=True, slots=True)
class Distilled:
    """The result of a distillation: sizes, latencies and scores of student and teacher."""

    # teacher and student in float32 with torch, then the student's ONNX graphs if one is int8
    served: Sequence[Served]
    # scores of teacher (`base`) and student (`tuned`) on the run's test records
    scores: Mapping[str, Comparison]
    records: int  # number of test records; 0 if the run has none
    texts: int  # number of texts in the student's training file
    sha256: str  # hash of that file


def distill(
    config: RunConfig,
    adapter: Path,
    to: Path,
    *,
    student: str,
    texts: str,
    columns: Mapping[str, str] | None = None,
    format: str = "sentence-transformers",
    int8: bool = False,
    seed: int = 0,
    passes: int = 10,
    progress: Progress = ignore_progress,
) -> Distilled:
    """Distill a run's model into a student, and export the student to a new folder in a standard format.

    Guarantee: the run's guarantee, if the texts are public, as is assumed for texts without a card.  For synthetic
    texts with a card, the epsilon of the runs in the card is added.

    Args:
        config: the configuration of a finished run.
        adapter: the run's adapter folder.
        to: the folder to create.
        student: `HALF` (lower half of the base's layers), the number of lowest layers to keep, or another base model as
            in `model.path`.
        texts: a file with at least `FEWEST` lines of text or records; labels are ignored.
        columns: role to column, for column names that differ from the run's own files.
        format: "sentence-transformers" or "onnx".
        int8: also write an ONNX graph with weights quantized to int8.
        seed: seed of the texts' order; the same seed gives the same student on the same machine.
        passes: number of epochs over the texts.
        progress: callback for progress in training steps.

    Returns:
        Sizes, latencies and scores of the student and the teacher.

    Raises:
        ConfigError: the run, the student, the folder or the texts' card cannot be used, or the run itself reads the
            texts.
        DataError: the texts cannot be read, or are too few.
    """
    task = config.bound_task
    if not task.has_head or config.data.input != "text" or "sentence-transformers" not in task.formats:
        bound = "cannot be distilled: use a run for text classification or regression"
        raise ConfigError("task", config.task, bound)
    check_int8(int8, config, format)
    check_at_least("passes", passes, 1)
    check_at_most("passes", passes, 1_000)
    check_at_least("seed", seed, 0)
    asked, own_records = read_prompts(config, texts, key="texts", columns=columns), RunRecords(config)
    require_disjoint(asked, own_records, key="texts", file=texts, allow_synthetic=True)
    sha256 = hash_file(file := Path(asked[0].file), key="texts")
    if len(asked) < FEWEST:
        raise DataError("texts", pluralize(len(asked), "text"), f"must be at least {FEWEST}")
    records, test = LeadRecords([task.without_answer(one, config.data) for one in asked]), own_records.test
    model = load_task_model(adapter, model=replace(config.model, dtype="float32"))  # refuses personalized adapters
    owed, behind = _describe_inherited_privacy(file, adapter)
    teacher, reference = Source.from_model(model, config, adapter, private_to=None)
    if (base := None if student == HALF or student.isdecimal() else ModelSpec(path=student)) is None:
        own = _keep_lower_layers(student, teacher)
    elif read_base_lineage(base):
        bound = "was exported from a run (see its config.json): choose a public base model"
        raise ConfigError("student", student, bound)
    else:  # another base with an initial head, and placeholder tokens to shape it
        spec, runtime = replace(model.spec, model=base, lora=LoraSpec(rank=1)), config.runtime
        plain = replace(config, runtime=replace(runtime, onednn=False, gradient_checkpointing=False))
        untrained = load_tokenizer_and_model(plain, lambda: build_task_model(spec))[1]
        own, reference = Source.from_model(untrained, config, adapter, private_to=None)
    write_lineage_mark(own.base.config, adapter, private_to=None, texts=behind)
    card: dict[str, bytes] = {}
    with create_model_folder(to, config, card, int8=int8) as folder:
        own = _train_student(own, teacher, records, seed=seed, passes=passes, progress=progress)
        nets, found = [one.wrap_base(one.base) for one in (teacher, own)], []
        for name, net, one in zip(("teacher", "student"), nets, (teacher, own), strict=True):
            # Without test records, the texts measure the latency, and scores are omitted.
            data = LeadData.build(test or records, config, one.tokenizer)
            size = 4 * sum(tensor.numel() for tensor in net.state_dict().values())
            found.append(measure_model(net, model, data, config, one.tokenizer, name, size))
        (was, before), (now, after) = found
        scores: Mapping[str, Comparison] = {}
        if test:
            scores = compare_by_scores(was, now, scores=partial(task.compute_final_scores, spec=model.spec))
        told = Distilled([before, after], scores, len(test.records) if test else 0, len(asked), sha256)
        card |= _build_card(told, teacher, own, format=format, file=file.name, base=base, owed=owed)
        own.tokenizer.save_pretrained(folder)
        WRITERS[format](own, replace(reference, logits=nets[1](reference.input_ids, reference.attention_mask)), folder)
    served = [*told.served, *(measure_graphs(to, model, data, config, own.tokenizer) if int8 else ())]
    return replace(told, served=[one if test else replace(one, scores={}) for one in served])


def _describe_inherited_privacy(texts: Path, adapter: Path) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """Return the privacy statement that a student inherits from the texts' card, and the runs in the card.

    Both are empty if the texts have no card, because such texts count as public.

    Raises:
        ConfigError: the card's runs have no finite epsilon, or another privacy unit than the teacher's run.
    """
    if not os.path.lexists(find_card_path(texts.resolve(), ".json")):
        return "", ()
    runs = read_card(texts, option="texts")["runs"]
    own = describe_run(from_run.build_run_report(adapter.absolute().parent), SavedAdapter.read(adapter).digest)
    if compose_losses(runs)[0] is None or runs[0]["unit"] != own["unit"]:
        bound = f"has a card without a finite epsilon per {own['unit']}, so the student's privacy loss is unbounded"
        raise ConfigError("texts", str(texts), bound)
    names = ", ".join(one["run"] for one in runs)
    both = format_total_loss([own, *runs]) or "nothing, as its teacher has none"
    words = (
        "the privacy statements below only cover its teacher. The card of these texts states "
        f"{format_total_loss(runs)} for each {own['unit']} of the runs behind them ({names}). The student's total "
        f"privacy loss is at most: {both}."
    )
    return words, runs


def _keep_lower_layers(layers: str, teacher: Source) -> Source:
    """Build a student from the lowest `layers` layers of the teacher's base.

    Raises:
        ConfigError: `layers` is not between 1 and the number of layers minus 1.
    """
    base = copy.deepcopy(teacher.base)
    stack, settings = find_layer_stack(base)[1], base.config.get_text_config()
    kept, count = len(stack) // 2 if layers == HALF else int(layers), len(stack)
    if not 1 <= kept < count:
        raise ConfigError("student", layers, f"must leave 1 to {count - 1} of the base's {count} layers")
    del stack[kept:]
    settings.num_hidden_layers = kept
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:kept]
    return replace(teacher, base=base, readout=copy.deepcopy(teacher.readout))


def _train_student(
    student: Source, teacher: Source, records: LeadRecords, *, seed: int, passes: int, progress: Progress
) -> Source:
    """Train the student on the mean squared error to the teacher's outputs, relative to the variance of the outputs."""
    device, sides = resolve_device(student.config.runtime.device), (teacher, student)
    nets = [one.wrap_base(one.base).to(device) for one in sides]
    rows = [LeadData.build(records, one.config, one.tokenizer).examples for one in sides]

    def compute_answers(side: int, places: np.ndarray) -> torch.Tensor:
        """Compute the outputs (rows, outputs) of the teacher (`side` 0) or the student (1) for the texts `places`."""
        batch = collate(rows[side], places, pad_id=sides[side].tokenizer.pad_token_id).to(device)
        found: torch.Tensor = nets[side](batch.input_ids, batch.attention_mask)
        return found

    lengths, parts = rows[1].lengths, math.ceil(len(rows[1]) / _BATCH)
    wanted = torch.cat([compute_answers(0, some) for some in np.array_split(np.arange(len(lengths)), parts)])
    spread = wanted.var(dim=0, unbiased=False).mean().clamp(min=1e-12)
    last = nets[1].get_buffer(f"weight_{nets[1].depth - 1}").requires_grad_(True)
    groups = [{"params": student.base.requires_grad_(True).parameters()}, {"params": [last], "lr": _HEAD_RATE}]
    optimizer, draws = torch.optim.AdamW(groups, lr=_RATE, fused=True), np.random.default_rng(seed)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=passes * parts)
    for number in range(passes):
        # Batch texts of similar length, to reduce padding.
        batches = np.array_split(np.argsort(lengths + draws.random(len(lengths))), parts)
        for place, some in enumerate((batches[which] for which in draws.permutation(parts)), 1):
            optimizer.zero_grad()
            errors = compute_answers(1, some) - wanted[torch.from_numpy(some)]
            torch.autograd.backward(errors.square().mean() / spread)
            optimizer.step()
            rates.step()
            progress("training the student", number * parts + place, passes * parts)
    for one in sides:
        one.base.requires_grad_(False).to("cpu")
    return replace(student, readout=(*student.readout[:-1], (last.detach().cpu(), student.readout[-1][1])))


def _build_card(
    found: Distilled, teacher: Source, student: Source, *, format: str, file: str, base: ModelSpec | None, owed: str
) -> Mapping[str, bytes]:
    """Build the student's model card from the run's card and the student's scores; `base` is its own base model."""
    run, score, scores = teacher.adapter.absolute().parent, teacher.task.primary_metric, ""
    record, report = from_run.read_run(run), (of_run := from_run.build_run_report(run))
    kept, count = (len(find_layer_stack(one.base)[1]) for one in (student, teacher))
    made = f"the lowest {kept} of the base's {count} layers"
    if base is not None:  # its card must not count as the card of the run's base
        record = replace(record, config=replace(record.config, model=replace(record.config.model, public_id=None)))
        made = f"on a base of its own, {base.public_path}, SHA-256 {hash_model(base)}"
    if found.scores and isinstance(report.facts, RunFacts):
        after = {name: one.tuned.value for name, one in found.scores.items()}
        report = replace(report, facts=replace(report.facts, final=after))
        of_teacher = f"{format_score_name(score)} of its teacher: {found.scores[score].base.value:.4f}"
        scores = f" Its scores are below; {of_teacher}."
    said = owed or (
        "if these texts are public, as the person who provided them declared, the privacy statements below also hold "
        "for the student (post-processing). The texts themselves have no guarantee."
    )
    what = (
        f"A smaller model ({made}), trained without noise to answer {pluralize(found.texts, 'text')} of {file} "
        f"(SHA-256 {found.sha256}) as its teacher does. It was not trained on any site's records: {said}{scores} Its "
        "teacher is a tuned model"
    )
    form = replace(get_card_form(format, record.config), what=what, has_label=not owed, is_judged=False)
    # the run's label, whose epsilon does not include the texts' runs
    label = render_card_files(record, of_run, form) if form.has_label else {}
    return {**label, CARD: render_card_text(record, report, form).encode()}
