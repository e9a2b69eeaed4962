"""Attacks from the literature: membership, site and attribute inference, extraction, and reconstruction.

**Membership inference**: loss, likelihood ratio to the base model, and LiRA with head-only shadow models.  LiRA
(Carlini et al. 2022, arXiv 2112.03570) compares a record's score under the model with its scores under shadow models
that were trained with and without the record.  Full shadow models would each cost a run.  Here a shadow model is a
ridge classifier on the tuned model's embeddings, fitted in closed form to a random half of all records.  Memorization
by the adapter is therefore calibrated by difficulty, not per example.

**Extraction**: exposure (Carlini et al. 2019, arXiv 1802.08232) ranks a planted secret by the model's loss among random
secrets of the same format: log2 of their number minus log2 of the rank.  Secrets are planted by adding records to a
site's file before training, and measure the memorization of unique texts.  Decoding greedily completes training
prompts, and compares the verbatim matches with those for prompts outside the training data.  For planted secrets it
continues the text before the secret, and compares with the model before training.

**Reconstruction from one update**: the attacker sees the noisy sum of one step of the first round, knows every other
record in it and subtracts them, and knows that the remaining record is one of N candidates.  It computes the gradient
of each candidate and takes the one that explains the release best.  For Gaussian noise this is the best possible guess
(the prior-aware attack of Hayes, Mahloujifar and Balle 2023, arXiv 2302.07225); methods that search for an unknown
text, such as gradient inversion, know less.  simulations/reconstruction reads words out of an update without them.
Noise enters only through its products with the candidates' gradients, which are normal with the covariance of the
gradients' inner products.  So the attack keeps only these products, and many draws of noise cost nothing.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from fedtune.codec import read_regular_file
from fedtune.data import Record
from fedtune.data.batching import collate, cut_micro_batches
from fedtune.evaluation.spec import WritingSpec
from fedtune.formatting import pluralize
from fedtune.lab.attack.target import TUNED, ScoredRecords, Target
from fedtune.lab.audit.guesses import Values
from fedtune.lab.audit.record_attack import FALSE_ALARMS, estimate_auroc, estimate_hit_rate, estimate_share
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.dp_library import GaussianDpEvent
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.run_plan import Plan
from fedtune.report.attacks import AttackFinding
from fedtune.report.derive import profile
from fedtune.runs.saved_model import BASE
from fedtune.spec import DataError
from fedtune.training.per_example import record_gradients

_RIDGE = 1e-3  # relative to the mean eigenvalue; keeps heads finite for few records
_MIN_LOSS = 1e-12
_LARGEST_EXPONENT = 700.0  # the exponential is still finite
GROUP = 20  # number of records per site in site inference
ALTERNATIVES = 999  # number of random secrets in the ranking of a planted secret
TOKENS = 16  # number of verbatim tokens that count as an extraction
_MAX_PROMPTS = 50
_MAX_SECRETS = 100
CONFIDENCE = 0.95  # confidence level of all intervals
CANDIDATES = 100  # number of records of which one is in the attacked step
TRIALS = 2000  # number of releases of that step
_MAX_VALUES = 1 << 28  # of all gradients in memory at once: 1 GiB
_MAX_TOKENS = 1024  # of records whose gradients are computed at once
_SAME = 1e-6  # relative to the larger squared length; gradients that are closer count as equal
_ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


@dataclass(frozen=True)
class Ranking:
    """Membership scores of an attack; a larger score indicates a member."""

    name: str
    members: Values
    others: Values


def rank_records(members: ScoredRecords, others: ScoredRecords, *, shadows: int, seed: int) -> list[Ranking]:
    """Compute the membership scores of all attacks that the task supports, for members and non-members."""
    rankings = [Ranking("loss", -members.after, -others.after), Ranking("ratio to the base", members.gain, others.gain)]
    if members.classes.min(initial=0) >= 0 and members.embeddings.shape[1]:
        scores = compute_lira_scores(members, others, shadows=shadows, seed=seed)
        count = len(members.after)
        rankings.append(Ranking("LiRA, head-only shadows", scores[:count], scores[count:]))
    return rankings


def compute_lira_scores(members: ScoredRecords, others: ScoredRecords, *, shadows: int, seed: int) -> Values:
    """Compute the LiRA score of each record, members first.

    Every shadow model is fitted to a random half of all records, so that each record is in about half of the shadow
    models.  A record's difficulty is the midpoint of its mean margins under the shadow models with and without the
    record.  Its score is the residual of its margin under the attacked model, after a linear regression of margin on
    difficulty over all records.  The residual is the likelihood ratio if all records move their own margins equally.

    Args:
        members: the records that were trained on.
        others: non-members; membership itself is not used.
        shadows: number of shadow models.
        seed: seed of the random halves.
    """
    embeddings = np.concatenate([members.embeddings, others.embeddings]).astype(np.float64)
    embeddings = np.concatenate([embeddings, np.ones((len(embeddings), 1))], axis=1)
    classes = np.concatenate([members.classes, others.classes])
    answers = np.eye(int(classes.max()) + 1)[classes]
    ridge = _RIDGE * np.trace(embeddings.T @ embeddings) / embeddings.shape[1]
    draws, margins = np.random.default_rng(seed), np.zeros((shadows, len(classes)))
    inside, rows = np.zeros((shadows, len(classes)), dtype=bool), np.arange(len(classes))
    for shadow in range(shadows):
        inside[shadow] = draws.random(len(classes)) < 0.5
        own = embeddings[inside[shadow]]
        head = np.linalg.solve(own.T @ own + ridge * np.eye(own.shape[1]), own.T @ answers[inside[shadow]])
        outputs = embeddings @ head
        own_outputs = outputs[rows, classes]
        outputs[rows, classes] = -np.inf
        margins[shadow] = own_outputs - (outputs.max(axis=1) if outputs.shape[1] > 1 else 0.0)
    times_in = np.maximum(1, inside.sum(axis=0))
    times_out = np.maximum(1, (~inside).sum(axis=0))
    middle = ((margins * inside).sum(axis=0) / times_in + (margins * ~inside).sum(axis=0) / times_out) / 2
    losses = np.clip(np.concatenate([members.after, others.after]), _MIN_LOSS, _LARGEST_EXPONENT)
    own_margins: Values = -np.log(np.expm1(losses))  # log p / (1 - p) of the true class
    if np.ptp(middle) == 0:
        return own_margins
    slope, offset = np.polyfit(middle, own_margins, 1)
    scores: Values = own_margins - offset - slope * middle
    return scores


def describe_membership(rankings: Sequence[Ranking], *, ceiling: float | None) -> AttackFinding:
    """Describe the strongest membership attack, with a Bonferroni-corrected interval for the selection."""
    each = 1 - (1 - CONFIDENCE) / len(rankings)
    areas = {one.name: estimate_auroc(one.members, one.others, confidence=each) for one in rankings}
    best = max(rankings, key=lambda one: areas[one.name][0])
    area, low, high = areas[best.name]
    figures: dict[str, float | None] = {f"auroc by {name}": found[0] for name, found in areas.items()}
    for share in FALSE_ALARMS:
        found = estimate_hit_rate(best.members, best.others, false_positive_rate=share, confidence=each)
        figures[f"found at {share:.1%} false alarms"] = None if found is None else found[0]
    said = f"Given a training record and an unused record, the attack by {best.name} identifies the training record "
    said += f"{round(100 * area)} times out of 100 (random guessing: 50)"
    said += "; this may be chance." if low <= 0.5 else "; this is more than chance."
    describe = partial(AttackFinding, attack="membership", measure="auroc", guessing=0.5, ceiling=ceiling)
    return describe(sentence=said, strength=area, low=low, high=high, figures=figures)


def describe_site_inference(by_site: Mapping[str, Values], others: Values, *, unit: Unit) -> AttackFinding:
    """Describe an attack that distinguishes `GROUP` records of a participating site from `GROUP` unused records.

    The guarantee does not protect the membership of a whole site.  The attacker averages the gain of each group
    (dataset inference; Maini, Yaghini and Papernot 2021, arXiv 2104.10706).

    Args:
        by_site: site -> gains (records,) of its training records.
        others: gains (records,) of records outside the training data.
        unit: the unit that the guarantee protects.
    """
    smallest = pluralize(min(map(len, by_site.values())), "record")
    who = f"the guarantee covers one {unit}, the smallest site has {smallest}"
    protection = f"The participation of a site is never protected: {who}, and run.json names all sites."
    sites = [mean for gains in by_site.values() for mean in _average_groups(gains)]
    nobody = _average_groups(others)
    describe = partial(AttackFinding, attack="site", measure="auroc_of_groups", guessing=0.5, ceiling=1.0)
    if len(nobody) < 2 or len(sites) < 2:
        few = f" No attack was run, because it requires at least {2 * GROUP} records in each group."
        return describe(sentence=protection + few)
    area, low, high = estimate_auroc(np.array(sites), np.array(nobody), confidence=CONFIDENCE)
    said = f" From {GROUP} records, an attack identifies a participating site {round(100 * area)} times out of 100."
    return describe(sentence=protection + said, strength=area, low=low, high=high)


def _average_groups(gains: Values) -> list[float]:
    whole = len(gains) // GROUP * GROUP
    return [float(mean) for mean in gains[:whole].reshape(-1, GROUP).mean(axis=1)]


def describe_attribute(members: ScoredRecords, others: ScoredRecords) -> AttackFinding:
    """Describe attribute inference: the model's accuracy on the labels of members, compared with non-members.

    The attacker knows all other fields of the record. The accuracy on non-members reflects the population, and does not
    leak a record.
    """
    describe = partial(AttackFinding, attack="attribute", measure="guessed_labels", guessing=0.0)
    if members.classes.min(initial=0) < 0:
        none = "Attribute inference was not run, because this task has no declared label set."
        return describe(sentence=none, applies=False)
    rates = [float(np.mean(one.classes == one.predicted)) for one in (members, others)]
    variance = sum(
        rate * (1 - rate) / len(one.classes) + 1 / (4 * len(one.classes) ** 2)
        for rate, one in zip(rates, (members, others), strict=True)
    )
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance)
    gap = rates[0] - rates[1]
    low, high = max(-1.0, gap - reach), min(1.0, gap + reach)
    said = f"An attacker who knows a record without its label guesses the label for {rates[0]:.1%} of the training "
    said += f"records and for {rates[1]:.1%} of unused records"
    said += "; the difference may be chance." if low <= 0 <= high else "; the difference is more than chance."
    figures: dict[str, float | None] = {"members": rates[0], "others": rates[1]}
    return describe(sentence=said, strength=gap, low=low, high=high, figures=figures)


@dataclass(frozen=True)
class PlantedSecret:
    """A secret that was planted in a run's training data."""

    fields: dict[str, str]  # role -> text of the record
    secret: str  # part of at least one of these texts

    def replace(self, other: str) -> Record:
        """Return the record with `other` instead of its secret."""
        return Record({role: text.replace(self.secret, other) for role, text in self.fields.items()})


def read_secrets(file: Path, target: Target) -> list[PlantedSecret]:
    """Read planted secrets from a JSON Lines file with the columns of the run's records and the column `secret`.

    Raises:
        DataError: a line lacks a column, or its texts do not contain the secret.
    """
    columns, found = target.config.bound_task.columns(target.config.data), list[PlantedSecret]()
    for number, line in enumerate(read_regular_file(file).decode().splitlines(), start=1):
        where = f"--secrets, line {number}"
        try:
            row = json.loads(line)
            fields = {role: str(row[column]) for role, column in columns.items()}
            secret = str(row["secret"])
        except (ValueError, TypeError, KeyError):
            bound = f"must be an object with {', '.join(columns.values())} and secret"
            raise DataError(where, "this line", bound) from None
        if not secret or not any(secret in text for text in fields.values()):
            raise DataError(where, "secret", "must occur in one of the record's texts")
        found.append(PlantedSecret(fields, secret))
    if not 0 < len(found) <= _MAX_SECRETS:
        raise DataError("secrets", len(found), f"must have 1 to {_MAX_SECRETS} lines")
    return found


def draw_alternatives(secret: str, draws: np.random.Generator) -> Iterator[str]:
    """Yield random secrets of the same format: random digits for digits, random letters for letters."""
    alphabets = [next((one for one in _ALPHABETS if sign in one), sign) for sign in secret]
    while True:
        yield "".join(alphabet[int(draws.integers(len(alphabet)))] for alphabet in alphabets)


def compute_exposure(rank: int, candidates: int) -> float:
    """Compute a secret's exposure in bits from the rank (from 1) of its loss among `candidates`.

    >>> compute_exposure(1, 1024), compute_exposure(512, 1024)
    (10.0, 1.0)
    """
    return math.log2(candidates) - math.log2(rank)


def rank_secret(planted: PlantedSecret, target: Target, draws: np.random.Generator) -> int:
    """Compute the rank (from 1) of a secret's loss under the tuned model, among `ALTERNATIVES` random secrets."""
    others = islice(draw_alternatives(planted.secret, draws), ALTERNATIVES)
    records = [planted.replace(planted.secret), *map(planted.replace, others)]
    losses = target.score_records(records).after
    return 1 + int((losses[1:] <= losses[0]).sum())  # ties count against the attack


def describe_exposure(ranks: Sequence[int]) -> AttackFinding:
    """Describe the exposure of planted secrets: the fraction with a rank in the top tenth of random secrets."""
    tenth = (ALTERNATIVES + 1) // 10
    hits = sum(rank <= tenth for rank in ranks)
    strength, low, high = estimate_share(hits, len(ranks), confidence=CONFIDENCE)
    exposures = sorted(compute_exposure(rank, ALTERNATIVES + 1) for rank in ranks)
    most = exposures[-1]
    said = f"The model ranks {hits} of {len(ranks)} planted secrets among the likeliest tenth of {ALTERNATIVES + 1:,} "
    said += f"of the same format; the largest exposure is {most:.1f} of {math.log2(ALTERNATIVES + 1):.1f} bits."
    figures: dict[str, float | None] = {"largest exposure": most, "median exposure": exposures[len(exposures) // 2]}
    describe = partial(AttackFinding, attack="extraction", measure="exposed_secrets", guessing=0.1)
    return describe(sentence=said, strength=strength, low=low, high=high, figures=figures)


def describe_written_secrets(planted: Sequence[PlantedSecret], target: Target) -> AttackFinding:
    """Describe the decoding of planted secrets: the fraction that the model writes after the text before the secret.

    The model before training writes as many of them as can be guessed from that text.
    """
    describe = partial(AttackFinding, attack="extraction", measure="written_secrets")
    found = {name: [_write_secret(one, target, name) for one in planted] for name in (TUNED, BASE)}
    tuned, base = ([one for one in found[name] if one is not None] for name in (TUNED, BASE))
    if not tuned:
        return describe(sentence="No planted secret was decoded, because no text has tokens before its secret.")
    if all(base):
        none = f"Planted secrets show nothing, because the model before training generated all {len(base)} verbatim: "
        return describe(sentence=f"{none}plant secrets that cannot be guessed.")
    strength, low, high = estimate_share(sum(tuned), len(tuned), confidence=CONFIDENCE)
    said = f"Given the text before a planted secret, the model generates {sum(tuned)} of {len(tuned)} secrets "
    said += f"verbatim; before training it generated {sum(base)}."
    return describe(sentence=said, strength=strength, low=low, high=high, guessing=sum(base) / len(base))


def _write_secret(planted: PlantedSecret, target: Target, adapter: str) -> bool | None:
    """Whether a model greedily continues a record's text with its secret; None if the text begins with the secret."""
    saved = target.saved
    task, tokenizer, data = saved.model.task, saved.tokenizer, target.config.data
    ids = task.tokenize([Record(planted.fields)], tokenizer, data=data).input_ids[0]
    whole = tokenizer.decode(ids.tolist())
    place = whole.rfind(planted.secret)
    texts = [tokenizer.decode(ids[:count].tolist()) for count in range(len(ids) + 1)]
    before = max((count for count, text in enumerate(texts) if len(text) <= place), default=0)
    if place < 0 or before == 0:
        return None
    saved.use_adapter(adapter)
    prompt = ids[:before].astype(np.int32)
    written = "".join(saved.generate_answer(prompt, WritingSpec(max_new_tokens=len(ids) - before)))
    expected = whole[len(texts[before]) : place + len(planted.secret)]
    return written.lstrip().startswith(expected.lstrip())


def describe_decoding(target: Target) -> AttackFinding:
    """Describe verbatim extraction: the fraction of training prompts that the model completes as in training."""
    describe = partial(AttackFinding, attack="extraction", measure="written_answers")
    members = [record for records in target.members.values() for record in records]
    counts = [_count_extracted(target, records) for records in (members, target.others)]
    if any(tried == 0 for _, tried in counts):
        none = f"Extraction was not tried, because too few records have an answer of at least {TOKENS} tokens."
        return describe(sentence=none)
    (found, tried), (of_others, tried_others) = counts
    if of_others == tried_others:
        none = f"Training prompts show nothing, because the model also completes all {tried_others} unused prompts "
        none += "verbatim: plant secrets, and pass --secrets."
        return describe(sentence=none)
    strength, low, high = estimate_share(found, tried, confidence=CONFIDENCE)
    said = f"The model repeats the first {TOKENS} tokens of the answer verbatim for {found} of {tried} training "
    said += f"prompts, and for {of_others} of {tried_others} unused prompts."
    return describe(sentence=said, strength=strength, low=low, high=high, guessing=of_others / tried_others)


def _count_extracted(target: Target, records: Sequence[Record]) -> tuple[int, int]:
    """Count verbatim completions by the tuned model; return their number and the number of attempts."""
    saved, task, data = target.saved, target.saved.model.task, target.config.data
    saved.use_adapter(TUNED)
    spec, draws = WritingSpec(max_new_tokens=TOKENS), np.random.default_rng(target.config.seed)
    found = tried = 0
    for place in draws.permutation(len(records)):
        fields = dict(records[place].fields)
        (answer,) = saved.tokenize_answers([fields])
        prompt = task.encode_prompt(fields, saved.tokenizer, data=data)
        if len(answer) < TOKENS or not len(prompt):
            continue
        if saved.positions is not None and len(prompt) + TOKENS > saved.positions:
            continue
        written = "".join(saved.generate_answer(prompt, spec))
        expected = saved.tokenizer.decode(answer[:TOKENS].tolist(), skip_special_tokens=True)
        found, tried = found + (written.strip() == expected.strip()), tried + 1
        if tried == _MAX_PROMPTS:
            break
    return found, tried


@dataclass(frozen=True)
class CandidateGradients:
    """The gradients of candidate records by their inner products.

    Attributes:
        products: (n, n) inner products of the gradients.
    """

    products: Values

    def clip(self, max_grad_norm: float) -> CandidateGradients:
        """Return the gradients, each clipped to this norm."""
        norms = np.sqrt(np.maximum(np.diag(self.products), np.finfo(np.float64).tiny))
        factors = np.minimum(1.0, max_grad_norm / norms)
        return CandidateGradients(self.products * np.outer(factors, factors))

    def count_distinct(self) -> int:
        """Count the candidates that are picked out of a release without noise: no other has the same gradient."""
        lengths = np.diag(self.products)
        distances = lengths[:, None] + lengths[None, :] - 2 * self.products
        near = distances <= _SAME * np.maximum(lengths[:, None], lengths[None, :])
        return int((near.sum(axis=1) == 1).sum())

    def count_picked(self, noise: float, draws: np.random.Generator, *, trials: int) -> int:
        """Count the right picks out of releases with noise of this standard deviation in each value.

        Every trial draws a candidate and noise anew; ties count against the attack.
        """
        count = len(self.products)
        values, vectors = np.linalg.eigh(self.products)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        secrets = draws.integers(count, size=trials)
        noises = noise * draws.normal(size=(trials, count)) @ root.T
        scores = self.products[secrets] + noises - np.diag(self.products) / 2
        own = scores[np.arange(trials), secrets]
        scores[np.arange(trials), secrets] = -np.inf
        return int((own > scores.max(axis=1)).sum())


def compute_candidate_gradients(target: Target, *, rank: int | None) -> CandidateGradients:
    """Compute the gradients of up to `CANDIDATES` training records at the model before training, with the run's seed.

    Args:
        target: the attacked run.
        rank: the LoRA rank that the attacked site trains; None: the whole adapter.
    """
    saved, config = target.saved, target.config
    records = [record for records in target.members.values() for record in records]
    values = sum(parameter.numel() for parameter in cut_to_rank(saved.model.trainable(), rank).values())
    count = min(len(records), CANDIDATES, max(2, _MAX_VALUES // values))
    chosen = sorted(np.random.default_rng(config.seed).permutation(len(records))[:count])
    saved.use_adapter(BASE)
    examples = saved.model.task.tokenize([records[n] for n in chosen], saved.tokenizer, data=config.data)
    rows, pad_id = torch.empty(count, values), saved.tokenizer.pad_token_id
    with saved.model.freeze_tensors(frozenset(), rank=rank), record_gradients(saved.model) as gradients:
        for part in cut_micro_batches(np.arange(count), examples.lengths, max_tokens=_MAX_TOKENS):
            each = gradients.compute_gradients(collate(examples, part, pad_id=pad_id).to(saved.model.device))
            rows[torch.from_numpy(part)] = torch.cat([one.flatten(1).cpu() for one in each.values()], dim=1)
    return CandidateGradients((rows @ rows.T).double().numpy())


def describe_picked_records(target: Target, plan: Plan) -> AttackFinding:
    """Describe how often the record in one step is picked among candidates, without and with clipping and noise.

    The ceiling is that of one Gaussian mechanism that certainly has the record: sampling is no help to an attacked
    record that is in the step.  If the sites' ranks differ, every rank is attacked, and the strongest attack is
    described, with a Bonferroni-corrected interval for the selection.
    """
    if plan.noise == "laplace":
        none = "No record was identified in an update, because this attack supports only Gaussian noise."
        return AttackFinding(attack="reconstruction", measure="picked_from_update", sentence=none)
    ranks = tuple(dict.fromkeys(target.config.federation.site_ranks.values()))
    each = 1 - (1 - CONFIDENCE) / len(ranks)
    found = [_describe_picks_at_rank(target, plan, rank, confidence=each) for rank in ranks]
    return max(found, key=lambda one: one.strength or 0.0)


def _describe_picks_at_rank(target: Target, plan: Plan, rank: int | None, *, confidence: float) -> AttackFinding:
    raw = compute_candidate_gradients(target, rank=rank)
    count, distinct = len(raw.products), raw.count_distinct()
    describe = partial(AttackFinding, attack="reconstruction", measure="picked_from_update", guessing=1 / count)
    figures: dict[str, float | None] = {"candidates": count, "picked without clipping and noise": distinct / count}
    where = "a step" if rank is None else f"a step of a site of rank {rank}"
    said = f"An attacker who knows that one of {count} records is in {where}, and all others in it, identifies it "
    if not plan.private:
        strength, low, high = estimate_share(distinct, count, confidence=confidence)
        said += f"{distinct} times out of {count}, because the run added no noise (random guessing: 1)."
        return describe(sentence=said, strength=strength, low=low, high=high, figures=figures)
    clipped, noise = raw.clip(plan.max_grad_norm), plan.accounted_noise
    draws = np.random.default_rng(target.config.seed)
    right = clipped.count_picked(noise * plan.max_grad_norm, draws, trials=TRIALS)
    strength, low, high = estimate_share(right, TRIALS, confidence=confidence)
    figures["picked without noise"] = clipped.count_distinct() / count
    said += f"{strength:.1%} of the time from the noisy sum, and {distinct / count:.0%} of the time without clipping "
    said += f"and noise (random guessing: {1 / count:.1%})."
    ceiling = profile.bound_hit_rate({GaussianDpEvent(noise): 1}, false_positive_rate=1 / count)
    return describe(sentence=said, strength=strength, low=low, high=high, ceiling=ceiling, figures=figures)
