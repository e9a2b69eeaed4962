"""Write a text for each of E2E's 630 test tables with finished runs of this study, and score the texts by BLEU.

    python simulations/study.py simulations/e2e --runs RUNS       the runs, which this script needs
    python simulations/e2e/score.py --runs RUNS                   bleu.json and the table of the README

BLEU follows e2e-metrics (github.com/tuetschek/e2e-metrics): tokens of mteval-v13a in lower case, all references of a
table, and the length of the closest one.  Texts are written greedily and by beam search with four beams, at most 64
tokens each, by the merged model in float32.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sacrebleu.metrics.bleu import BLEU
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import fedtune
from fedtune.evaluation.generation import group_by_prompt
from fedtune.privacy.accountant import format_epsilon
from fedtune.sites.run_records import RunRecords

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

HERE = Path(__file__).parent
WAYS = {"greedy": 1, "beam": 4}
MAX_NEW_TOKENS = 64
ROWS = 32
RESAMPLES = 1000


def score_run(runs: Path, key: str) -> study.Found:
    """Score the texts of a line's run; the interval is a bootstrap over tables, with all references of each."""
    run = fedtune.load(runs / f"{key}-0-0")
    data = replace(run.config.data, test_rows=None)
    records = RunRecords(replace(run.config, data=data)).test
    model, tokenizer = run.model("merged")
    task = run.config.bound_task
    assert records is not None
    assert isinstance(model, PreTrainedModel)
    asked = task.prompts_and_references(records.records, tokenizer, data=data)
    assert asked is not None
    prompts, references = group_by_prompt(*asked)
    scores, some = dict[str, float](), dict[str, list[str]]()
    for way, beams in WAYS.items():
        texts = write_texts(model, tokenizer, prompts, beams=beams)
        counts = count_ngrams(texts, references)
        low, high = bootstrap(counts)
        scores |= {way: compute_bleu(counts.sum(axis=0)), f"{way}_low": low, f"{way}_high": high}
        some[way] = texts[:5]
        print(f"{way}: {scores[way]:.2f} ({low:.2f} to {high:.2f})", flush=True)
    about = {"epsilon": run.privacy.epsilon, "seconds": run.result.final.seconds, "tables": len(prompts)}
    return {**about, "references": len(records.records), "each_run": [scores], "texts": some}


def write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[npt.NDArray[Any]], *, beams: int
) -> list[str]:
    """Continue each prompt up to the end-of-text token; sampling settings of the checkpoint are not used."""
    settings = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [""] * len(prompts)
    for places in cut(sorted(range(len(prompts)), key=lambda place: len(prompts[place]))):
        longest = max(len(prompts[place]) for place in places)
        ids = torch.full((len(places), longest), int(tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            size = len(prompts[place])
            ids[row, longest - size :] = torch.from_numpy(prompts[place]).long()
            mask[row, longest - size :] = 1
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
        for place, row in zip(places, written[:, longest:], strict=True):
            texts[place] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return texts


def cut(places: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut indices into batches of `ROWS`."""
    for first in range(0, len(places), ROWS):
        yield places[first : first + ROWS]


def count_ngrams(texts: Sequence[str], references: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Return (n, 10): per text, matched n-grams of orders 1 to 4, n-grams of these orders, its length, and the length
    of the closest reference.
    """
    bleu = BLEU(lowercase=True, effective_order=True)
    each = (bleu.sentence_score(text, list(group)) for text, group in zip(texts, references, strict=True))
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in each], dtype=np.int64)


def compute_bleu(total: npt.NDArray[np.int64]) -> float:
    """Compute BLEU, in [0, 100], from (10,) sums of `count_ngrams`."""
    counts = total.tolist()
    return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="none").score)


def bootstrap(counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of BLEU over resampled tables."""
    draws = np.random.default_rng(0)
    scores = [compute_bleu(counts[draws.integers(len(counts), size=len(counts))].sum(axis=0)) for _ in range(RESAMPLES)]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def table(lines: Mapping[str, study.Found]) -> str:
    """Format the table of the README."""
    rows = [["", "epsilon", *(f"BLEU, {way}" for way in WAYS)]]
    for line in lines.values():
        (scores,) = line["each_run"]
        cells = (f"{scores[way]:.1f} ({scores[f'{way}_low']:.1f} to {scores[f'{way}_high']:.1f})" for way in WAYS)
        rows.append([line["title"], format_epsilon(line["epsilon"]), *cells])
    return readme.markdown(rows)


def main() -> None:
    asked = study.parser(__doc__, HERE).parse_args()
    titles = {line["key"]: line["title"] for line in tomllib.loads((HERE / "study.toml").read_text())["lines"]}
    present = [key for key in titles if asked.runs and (asked.runs / f"{key}-0-0" / "run.json").is_file()]

    def score(runs: Path, key: str) -> study.Found:
        return {"title": titles[key], **score_run(runs, key)}

    lines = {key: partial(score, key=key) for key in present}
    study.carry_out(__file__, lines, table, asked=asked, file="bleu.json")


if __name__ == "__main__":
    main()
