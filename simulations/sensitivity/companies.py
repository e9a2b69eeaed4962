"""Whether a record's gradient is the same, bit for bit, in a thousand random companies: each bucket, 1 and 2 threads.

    python simulations/sensitivity/companies.py --companies 1000

Each line is a model as one of the shipped experiments trains it.  For every length that a micro-batch may have, a
few records of that length are computed in random companies: any number of other records of any length, in any order.
companies.json is written after every bucket.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from run import LINES

from fedtune.api.compose import compose_run
from fedtune.data import Shapes
from fedtune.lab.audit.sensitivity import generate_random_examples
from fedtune.sites.shared_model import LoadedModel
from fedtune.training.examples import SiteExamples
from fedtune.training.per_example import PerExampleGradients, record_gradients

RESULTS = Path(__file__).parent / "companies.json"
NAMES = (
    "MiniLM, the main job",
    "MiniLM, head and LoRA on all linear layers",
    "SmolLM2-135M, the shipped LoRA",
)
"""Of the search's lines, whose settings these are."""
WATCHED, OTHERS = 6, 18
Gradient = dict[str, torch.Tensor]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--companies", type=int, default=1000, help="of every line and number of threads")
    arguments.add_argument("--only", nargs="*", help="names of lines, or parts of them")
    arguments.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    arguments.add_argument("--seed", type=int, default=0, help="another one adds to what a line has so far")
    options = arguments.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"lines": {}}
    results["machine"] = f"{platform.machine()}, CPU only"
    for name in NAMES:
        if options.only and not any(one in name for one in options.only):
            continue
        for threads in options.threads:
            torch.set_num_threads(threads)
            shared = LoadedModel(compose_run(LINES[name][1]).with_number_format("float32"))
            buckets = shared.shapes.lengths
            line = results["lines"].setdefault(f"{name}, threads: {threads}", {})
            line["buckets"] = list(buckets)
            for length in buckets:
                found = bucket(shared, length, companies=-(-options.companies // len(buckets)), seed=options.seed)
                for key, value in found.items():
                    line[key] = line.get(key, 0) + value
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, threads, line, flush=True)


def bucket(shared: LoadedModel, length: int, *, companies: int, seed: int) -> dict[str, int]:
    """Records of one length in random companies, compared with themselves alone."""
    draws, shapes = np.random.default_rng([length, seed] if seed else length), shared.shapes
    longest = shapes.compute_longest_record(shapes.lengths[-1])
    lengths = [*of_length(shapes, length, WATCHED, draws), *draws.integers(1, longest, OTHERS, endpoint=True)]
    records = SiteExamples(
        generate_random_examples(shared.model, lengths, draws), pad_id=0, shapes=shapes, device=shared.device
    )
    if shared.keeps_states:
        records.cache_frozen_states(shared.model)
    generator = torch.Generator().manual_seed(length)
    with torch.no_grad():
        for parameter in shared.model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    counts = {"companies": companies, "compared": 0, "differed": 0}
    with record_gradients(shared.model) as gradients:
        alone = {place: together(gradients, records, np.array([place]))[place] for place in range(WATCHED)}
        for _ in range(companies):
            watched = draws.permutation(WATCHED)[: draws.integers(1, WATCHED, endpoint=True)]
            others = WATCHED + draws.permutation(OTHERS)[: draws.integers(0, OTHERS, endpoint=True)]
            company = draws.permutation(np.concatenate([watched, others]))
            found = together(gradients, records, company)
            for place in watched.tolist():
                counts["compared"] += 1
                counts["differed"] += not all(
                    torch.equal(found[place][name], one) for name, one in alone[place].items()
                )
    return counts


def together(gradients: PerExampleGradients, records: SiteExamples, company: np.ndarray) -> dict[int, Gradient]:
    """The gradients of the watched ones in this company, as a step computes them."""
    found: dict[int, Gradient] = {}
    for part in records.parts(company.astype(np.int64)):
        if (part.places < WATCHED).any():
            rows = gradients.compute_all_gradients(records.batch(part))
            for row, place in enumerate(part.places.tolist()):
                if place < WATCHED:
                    found[place] = {name: one[row].clone() for name, one in rows.items()}
    return found


def of_length(shapes: Shapes, length: int, count: int, draws: np.random.Generator) -> list[int]:
    """Numbers of tokens that are padded to `length`, the most among them."""
    longest = shapes.compute_longest_record(length)
    fitting = [
        tokens
        for tokens in range(1, longest + 1)
        if next(one for one in shapes.lengths if tokens <= shapes.compute_longest_record(one)) == length
    ]
    return [fitting[-1], *draws.choice(fitting, size=count - 1).tolist()]


if __name__ == "__main__":
    main()
