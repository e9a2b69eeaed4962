#!/usr/bin/env python3
"""Check a fedtune report.json without fedtune: signatures, epsilon from what the sites signed, verdict, model files.

    python verify_report.py runs/tickets --key HEX --roster roster.json

It needs numpy, scipy and cryptography.  From the report's facts and the sites' signed receipts, it computes the privacy
loss by itself (its distribution, rounded up and composed by FFT; for a ledger the Renyi divergence), and compares
epsilon and verdict.  Exit code 0: all holds; 1: not, or not comparable.  `fedtune report verify` checks other figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from scipy.optimize import brentq
from scipy.special import expit, ndtr
from scipy.stats import binom

SCHEMA = 10
SLACK, LAST_DIGITS = 1e-3, 1e-9  # this program's epsilon is an upper bound, in tests at most SLACK / 2 above fedtune's
MONTHS = {"month": 1, "quarter": 3, "year": 12}
BOUND, FAR = 300.0, 14.0  # of losses, and in standard deviations, beyond which nothing is told apart
BESIDE_MODEL = {"README.md", "label.svg"}  # the model's card, directly in its folder
A, B, IA3, NORMS, OFFSET = ".lora_A.weight", ".lora_B.weight", ".ia3_l", ".lora_magnitude_vector", ".scales.offset"
# Kind of adapter -> its files, and what the names of each module's tensors there end with; the last one is trained.
TENSORS: dict[str, dict[str, tuple[str, ...]]] = {
    "none": {},
    "lora": {"adapter_model": (A, B)},
    "dora": {"adapter_model": (A, B, NORMS), "offsets": (OFFSET,)},
    "ia3": {"adapter_model": (IA3,), "offsets": (OFFSET,)},
}
PEFT = {"bias": "none", "inference_mode": True, "init_lora_weights": True, "init_ia3_weights": True}  # of any adapter
PEFT |= {"megatron_core": "megatron.core", "qalora_group_size": 16}
PRETRAINED = {"digest": "vaultgemma", "unit": "sequence of 1,024 tokens", "delta": 1.1e-10, "epsilon": 2.0}
WITH_HEAD = ("classification", "multi_label", "ordinal", "regression", "survival", "votes", "token_classification")
HEADS = dict.fromkeys(("causal_lm", "preference", "embedding"), False) | dict.fromkeys(WITH_HEAD, True)  # of each task
COUNTS = {"rounds", "count", "local_steps", "num_rounds", "spare_rounds", "lost_rounds", "charged_rounds"}
COUNTS |= {"num_sites", "threshold", "colluders"}
PRIME, OF_ORDER_8 = 2**255 - 19, 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL_ORDER = {0, 1, PRIME - 1, PRIME, PRIME + 1, OF_ORDER_8, PRIME - OF_ORDER_8}  # anybody can sign under these keys
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
Json = dict[str, Any]
LAPLACE = 0.0
Event = tuple[float, float]  # sampling rate (LAPLACE: Laplace noise, and no sampling) and noise multiplier


class Wrong(Exception):
    """Something in the report does not hold, or can't be compared."""


def require(right: bool, text: str) -> None:
    if not right:
        raise Wrong(text)


def read_json(path: Path) -> Json:
    """An object of a file; a pipe would be waited for."""
    require(path.is_file() and path.stat().st_size <= 1 << 26, f"{path} is not a file of at most 64 MiB")

    def check_object(pairs: list[tuple[str, Any]]) -> Json:
        require(len(dict(pairs)) == len(pairs), f"{path} repeats a key")  # the signed bytes would not show it
        counts = {key: one for key, one in pairs if key in COUNTS and not isinstance(one, list)}
        odd = [f"{key} {one}" for key, one in counts.items() if type(one) is not int or one < 0]
        require(not odd, f"{path} has invalid counts: {odd}")
        return dict(pairs)

    data = path.read_bytes()
    found = json.loads(data, object_pairs_hook=check_object)
    require(isinstance(found, dict), f"{path} is not an object")
    if "verdict" in found:  # a report
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        require(data == text.encode(), f"{path} is not written as fedtune writes a report")
    return dict(found)


def is_signed(key: str, purpose: str, message: bytes, signature: str) -> bool:
    """Whether `signature` is an Ed25519 signature by `key`, in the frame that names its purpose."""
    if not re.fullmatch("[0-9a-f]{64}", key) or not re.fullmatch("[0-9a-f]{128}", signature):
        return False
    if int.from_bytes(bytes.fromhex(key), "little") % 2**255 in SMALL_ORDER:
        return False
    try:
        holder = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        holder.verify(bytes.fromhex(signature), b"fedtune " + purpose.encode() + b"\0" + message)
    except (InvalidSignature, ValueError):
        return False
    return True


def signer_of(report: Json) -> str:
    require(report["signature"] is not None, "the report is not signed")
    fields = {key: value for key, value in report.items() if key != "signature"}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    key, signature = report["signature"]["key"], report["signature"]["signature"]
    require(len(report["signature"]) == 2, "its signature has other fields than a key and a signature")
    require(is_signed(key, "report", text.encode(), signature), "its signature does not fit the report")
    return str(key)


def members(path: Path, signer: str) -> list[Json]:
    """The sites of a roster, which the `signer` must have signed if the report is a run's."""
    roster = read_json(path)
    fields = {key: value for key, value in roster.items() if key != "signature"}
    message = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    require(not signer or is_signed(signer, "roster", message, roster["signature"]), f"{signer} did not sign {path}")
    return list(roster["sites"])


def plan_digest(plan: Json) -> str:
    """SHA-256 of a plan as a site signs it: without what is usual."""
    usual = {"shared": None, "cohorts": None, "runs": 1, "noise": "gaussian"}
    usual |= {"records_per_user": plan["records_per_user"]} if plan["unit"] == "record" else {}
    fields = {key: value for key, value in plan.items() if key not in usual or value != usual[key]}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def events_of(plan: Json, rounds: int) -> dict[Event, int]:
    """The mechanisms of so many rounds of a plan, counted; secure aggregation counts the fewest honest shares."""
    noise, shared = float(plan["noise_multiplier"]), plan["shared"]
    if shared is not None:
        sites, least, others = shared["num_sites"], shared["threshold"], shared["colluders"]
        right = least <= sites and others < sites and 2 * least > sites + others
        require(right, f"no sum of {least} of {sites} sites hides one site from {others} others")
        noise = shared["noise_multiplier"] * math.sqrt(max(1, least - others))
    found = {mechanism(plan.get("noise", "gaussian"), plan["sampling_rate"], noise): plan["local_steps"] * rounds}
    if (of_scores := float(plan["metrics_noise_multiplier"])) > 0:
        found[1.0, of_scores] = found.get((1.0, of_scores), 0) + rounds
    return {one: count for one, count in found.items() if count}


def mechanism(noise: str, rate: float, sigma: float) -> Event:
    """A mechanism with this noise; of Gaussian noise, the rate is in (0, 1], so that none is taken for Laplace's."""
    rate = {"laplace": 1.0, "gaussian": float(rate)}[noise]
    require(0 < rate <= 1 and float(sigma) >= 0, f"no mechanism has the rate {rate} and the noise {sigma}")
    return LAPLACE if noise == "laplace" else rate, float(sigma)


def max_rounds(plan: Json) -> int:
    return int(plan["num_rounds"] + plan["spare_rounds"])


def between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Normal probability of (low, high], from the tail that keeps its digits."""
    return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))


def loss_distribution(event: Event, width: float, *, removed: bool) -> tuple[np.ndarray, int, float]:
    """The privacy loss of one step on a grid of `width`: chances, number of the first point, chance of infinity.

    Each cell's mass is split over its two ends so that both distributions of the pair keep theirs; the hockey-stick
    divergence is convex, so the result dominates the mechanism ("connect the dots", Doroshenko et al. 2022).
    """
    rate, sigma = event
    if rate == LAPLACE:
        return laplace_distribution(sigma, width)
    losses = loss_at(np.array([-FAR * sigma, FAR * sigma + 1]), rate, sigma)
    least, most = (losses if removed else -losses[::-1]) / width
    first, last = math.floor(max(least, -BOUND / width)) - 1, math.ceil(min(most, BOUND / width)) + 1
    grid = np.arange(first, last + 1) * width
    # Where on the line each loss of the grid is; the loss rises with x if removed, else it falls.
    x = invert_loss(grid if removed else -grid, rate, sigma)
    low, high = (x[:-1], x[1:]) if removed else (x[1:], x[:-1])
    none = between(low / sigma, high / sigma)
    mixed = (1 - rate) * none + rate * between((low - 1) / sigma, (high - 1) / sigma)
    upper, other = (mixed, none) if removed else (none, mixed)
    chances = split_over_ends(upper, other, grid, width)
    # All below the grid counts at its first point, all above as certain to give the record away.
    chances[0] += mass_of(x[0], rate, sigma, removed=removed, above=False)
    return chances, first, mass_of(x[-1], rate, sigma, removed=removed, above=True)


def laplace_distribution(scale: float, width: float) -> tuple[np.ndarray, int, float]:
    """The same for Laplace noise: from -1/scale to 1/scale, which half of all outputs have, and never beyond."""
    last = math.ceil(1 / scale / width)
    grid = np.arange(-last, last + 1) * width
    # The loss of an output at x in [0, 1] is (1 - 2x) / scale: its distribution function with the unit, and without.
    inside = np.clip(grid * scale, -1.0, 1.0)
    mixed = np.diff(np.exp((inside - 1) / scale / 2) / 2, prepend=0.0)
    none = np.diff(1 - np.exp(-(inside + 1) / scale / 2) / 2, prepend=0.0)
    mixed[-1], none[-1] = 1 - mixed[:-1].sum(), 1 - none[:-1].sum()
    chances = split_over_ends(mixed[1:], none[1:], grid, width)
    chances[0] += mixed[0]
    return chances, -last, 0.0


def split_over_ends(upper: np.ndarray, other: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Solve p(low) + p(high) = upper and p(low) e^-low + p(high) e^-high = other for each cell, and sum by point."""
    high_part = np.clip((upper - other * np.exp(grid[:-1])) / -np.expm1(-width), 0.0, upper)
    return np.append(0.0, high_part) + np.append(upper - high_part, 0.0)


def loss_at(x: np.ndarray, rate: float, sigma: float) -> np.ndarray:
    """Log of the mixture's density over that without the record."""
    shifted = (2 * x - 1) / (2 * sigma**2)
    return shifted if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + shifted)


def invert_loss(losses: np.ndarray, rate: float, sigma: float) -> np.ndarray:
    """Where on the line a loss is reached; -inf below all of them."""
    if rate == 1:
        return losses * sigma**2 + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(losses > 0, losses + np.log1p(-(1 - rate) * np.exp(-losses)), np.log(np.expm1(losses) + rate))
        found = sigma**2 * (inside - math.log(rate)) + 0.5
    return np.where(np.isnan(found), -np.inf, found)


def mass_of(x: float, rate: float, sigma: float, *, removed: bool, above: bool) -> float:
    """Mass of the losses above or below the one at x; the loss rises with x if removed, else it falls."""
    side = -1.0 if above == removed else 1.0  # the right tail, or the left one
    if not removed:
        return float(ndtr(side * x / sigma))
    return float((1 - rate) * ndtr(side * x / sigma) + rate * ndtr(side * (x - 1) / sigma))


def epsilon_of(charged: dict[Event, int], delta: float) -> float:
    """An upper bound on epsilon at `delta` of all that was charged; infinite without noise."""
    if not charged:
        return 0.0
    if any(sigma <= 0 for _, sigma in charged):
        return math.inf
    # About the standard deviation of each loss, and of their sum.
    each = {event: (event[0] or 1.0) * math.sqrt(math.expm1(min(event[1] ** -2, 8.0))) for event in charged}
    spread = math.sqrt(sum(count * each[event] ** 2 for event, count in charged.items()))
    width = min(2e-3, max(min(each.values()) / 20, spread / 50_000))
    return max(epsilon_one_way(charged, delta, width, removed=removed) for removed in (True, False))


def epsilon_one_way(charged: dict[Event, int], delta: float, width: float, *, removed: bool) -> float:
    parts = [(*loss_distribution(event, width, removed=removed), count) for event, count in charged.items()]
    log_finite = sum(count * math.log1p(-infinite) for _, _, infinite, count in parts)
    small = math.log(delta) - 20

    def reach(side: int) -> float:
        """How far from 0 the sum is, but for a chance that delta does not see: by Chernoff's bound."""
        found = []
        for order in (side * 2.0**power for power in range(-6, 9)):
            moment = 0.0
            for chances, first, _, count in parts:
                with np.errstate(divide="ignore"):
                    exponents = np.log(chances) + order * (np.arange(len(chances)) + first) * width
                moment += count * float(np.logaddexp.reduce(exponents))
            found.append((moment - small) / abs(order))
        return min(found)

    low, high = math.floor(-reach(-1) / width) - 1, math.ceil(reach(1) / width) + 1
    size = 1 << max(1, high - low + 1, *(len(chances) for chances, _, _, _ in parts)).bit_length()
    require(size <= 1 << 25, "a plan that would take hours to compute")
    product, offset = np.ones(size // 2 + 1, dtype=complex), 0
    for chances, first, _, count in parts:
        product *= np.fft.rfft(chances, size) ** count
        offset += first * count
    summed = np.clip(np.fft.irfft(product, size), 0.0, None)
    # Point n of the circle is the loss low, low + 1, ... of the sum.
    losses = (np.arange(size) + low) * width
    summed = summed[(np.arange(size) + low - offset) % size]
    beyond = -math.expm1(log_finite) + 2 * math.exp(small)

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float((summed[above] * -np.expm1(epsilon - losses[above])).sum()) + beyond - delta

    if excess(0.0) <= 0 or excess(losses[-1]) > 0:
        return 0.0 if excess(0.0) <= 0 else math.inf
    return float(brentq(excess, 0.0, losses[-1], xtol=1e-9)) + 1e-9


def divergence(event: Event, order: float) -> float:
    """The Renyi divergence of one step, by quadrature: the sum of a Gaussian's smooth values converges at once."""
    rate, sigma = event
    if sigma <= 0:
        return math.inf
    if rate == LAPLACE:  # Mironov 2017, Proposition 6
        shares = math.log(order / (2 * order - 1)), math.log((order - 1) / (2 * order - 1))
        return float(np.logaddexp(shares[0] + (order - 1) / sigma, shares[1] - order / sigma)) / (order - 1)
    x = np.linspace(-40 * sigma, order + 40 * sigma, 200_001)
    log_normal = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    values = log_normal + order * loss_at(x, rate, sigma)
    return max(0.0, float(np.logaddexp.reduce(values)) + math.log(x[1] - x[0])) / (order - 1)


def filter_epsilon(charged: dict[Event, int], order: float, delta: float) -> float:
    """Epsilon of a ledger by its Renyi filter."""
    total = sum(count * divergence(event, order) for event, count in charged.items())
    return 0.0 if not charged else max(0.0, total + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def rounds_of(facts: Json, site: Json) -> int:
    """Rounds that count as charged: what the site signed once the run had ended there, else all."""
    plan, receipt, most = facts["plan"], site["receipt"], max_rounds(facts["plan"])
    if receipt is None:
        return most
    name, charged = site["site"], receipt["charged_rounds"]
    message = json.dumps({key: value for key, value in receipt.items() if key != "signature"}, sort_keys=True).encode()
    right = is_signed(receipt["site_key"], "receipt", message, receipt["signature"])
    require(right, f"{name} did not sign its receipt")
    require((receipt["site"], receipt["run"]) == (name, facts["run"]), f"the receipt of {name} is of something else")
    of_plan = receipt["plan"] == plan_digest(plan) or (not receipt["plan"] and not charged)
    require(of_plan, f"{name} signed another plan")
    require(0 <= charged <= most, f"{name} signed more rounds than the plan has")
    require(receipt["seeded_noise"] <= facts["seeded_noise"], f"{name} signed that its noise came from a seed")
    sent = ("invalid_update", "beyond_plan")
    updates = sum(name in one["sites"] or one["failed_sites"].get(name) in sent for one in facts["rounds"])
    runs = site["statement"]["lifetime"]["runs"] if site["statement"] else []
    told = [one["rounds"] for one in runs if one["run"] == facts["run"]]
    rounds = max([int(charged if receipt["ended"] else most), *told])
    require(max(updates, charged) <= rounds, f"more left {name} than it was charged for")
    old = site["statement"] and not told and max(updates, charged)
    require(not old, f"the report of {name} over all its runs was made before this run")
    return rounds


def check_sent(facts: Json, keys: dict[str, str] | None) -> None:
    """Compare sites, records and model with the settings that the run's name is the digest of."""
    deployed, made = facts["settings"].get("runtime") == "deployment", facts["provenance"]
    digest = hashlib.sha256(facts["sent"].encode()).hexdigest() if deployed else made["config_sha256"]
    require(facts["run"] == f"{facts['name']}-{digest[:32]}", "the run's name is not the digest of its settings")
    require((facts["target_epsilon"] is None) == (facts["plan"]["noise_multiplier"] == 0), "its target is left out")
    if not deployed:
        return
    sent = json.loads(facts["sent"])
    federation, sizes = sent["federation"], sent["data"]["declared_sizes"]
    names = federation["site_names"]
    sizes = sizes if isinstance(sizes, list) else [sizes] * len(names)
    active = federation["participants"] or names
    declared = {name: size for name, size in zip(names, sizes, strict=True) if name in active}
    said = {site["site"]: site["declared_size"] for site in facts["sites"]}
    require(said == declared and len(facts["sites"]) == len(declared), "its sites are not those that were asked")
    require(facts["target_epsilon"] in (sent["privacy"]["epsilon"], None), "its target is not what the run was given")
    about = (sent["model"]["sha256"], sent["data"]["dataset"], sent["task"])
    require((made["model_sha256"], made["dataset"], made["task"]) == about, "the sites were sent another base or data")
    start, asked = made["start_adapter"] or {}, sent["model"]["adapter_sha256"]
    signers = set(sent["privacy"].get("start_keys") or ())
    counted = start.get("epsilon") is not None and not start.get("public") and not PRETRAINED.items() <= start.items()
    proved = not counted or bool(keys and signers and signers <= {*keys.values()})
    require(proved, "the epsilon of the training before this run is the lead's word, or give a --roster with its sites")
    require(asked in (None, start.get("digest")), "it began in another adapter")
    require(start.get("public", False) == ("public" in sent), "the sites were sent another origin of its start")
    for key in ("epsilon", "delta", "unit") if asked else ():
        same = start[key] == sent["privacy"].get(f"start_{key}")
        require(same, f"the sites were sent another {key} of its start")


def check_statements(facts: Json, folder: Path) -> None:
    """Compare what the report repeats of sites' own reports with these, which the sites signed."""
    own = [read_json(path) for path in sorted(folder.glob("*.json"))]
    signed = {one["facts"]["site"]: one for one in own if one["facts"]["kind"] == "ledger"}
    for site in facts["sites"]:
        if (said := site["statement"]) is not None:
            name = site["site"]
            require(name in signed, f"the figures of {name} over all its runs were not compared: give its own report")
            report, receipt = signed[name], site["receipt"]
            require(receipt and signer_of(report) == receipt["site_key"], f"the report of {name} is another's")
            made, theirs = report["sites"][0], report["facts"]
            right = {"verdict": made["verdict"], "lifetime": made["lifetime"], "date": theirs["date"][:10]}
            right |= {key: theirs[key] for key in ("approved", "verification", "asserted")}
            require(right == {key: said[key] for key in right}, f"{name} signed other figures over all its runs")


def check_run(report: Json, keys: dict[str, str] | None, folder: Path) -> tuple[str, float]:
    """The verdict and the epsilon of a run."""
    facts = report["facts"]
    plan, delta, states, epsilons = facts["plan"], facts["plan"]["delta"], [], []
    receipts = {site["site"]: site["receipt"] for site in facts["sites"] if site["receipt"]}
    deployed = facts["settings"].get("runtime") == "deployment"
    said_so = all(receipt["simulated"] != deployed for receipt in receipts.values())
    require(said_so, "the sites signed whether they are simulated, and the report denies it")
    require(not deployed or keys is not None, "the sites' keys were not compared: give --roster")
    for name in (site["site"] for site in facts["sites"] if deployed):
        require(name in receipts and receipts[name]["ended"], f"{name} did not sign that the run is over")
        require((keys or {}).get(name) == receipts[name]["site_key"], f"the roster has another key of {name}")
    require(keys is None or deployed, "a simulation's keys are no real sites'")
    check_sent(facts, keys)
    check_statements(facts, folder / "site_reports")
    reported = {site["site"]: site for site in report["sites"]}
    same = [site["site"] for site in facts["sites"]] == [site["site"] for site in report["sites"]] == [*reported]
    require(same, "figures of other sites")
    of_rounds = cache(lambda rounds: epsilon_of(events_of(plan, rounds), delta))
    for site in facts["sites"]:
        rounds, spent = rounds_of(facts, site), reported[site["site"]]["spent"]
        whole = of_rounds(max_rounds(plan) if rounds else 0)
        check_epsilon(f"{site['site']}: epsilon", spent["epsilon"], whole)
        check_epsilon(f"{site['site']}: the charged epsilon", spent["epsilon_pld"], of_rounds(rounds))
        require(spent["rounds"] == rounds, f"{site['site']} was charged {rounds} rounds")
        epsilons.append(whole)
        states.append(state_at(facts, site, whole, rounds))
    return min(states, key=("no_guarantee", "exceeded", "within").index), max(epsilons)


def state_at(facts: Json, site: Json, epsilon: float, rounds: int) -> str:
    """The verdict at one site of a run, by the epsilon that this program found."""
    target, made, audit = number(facts["target_epsilon"]), facts["provenance"], facts["audit"]
    nothing = rounds > 0 and (math.isinf(epsilon) or facts["seeded_noise"])
    nothing |= facts["config_file_sha256"] != made["config_sha256"]
    nothing |= facts["canaries_planted"] if audit is None else is_refuted(audit, site["site"], epsilon)
    statement = site["statement"]
    told = statement["verdict"]["state"] if statement else "within"
    if nothing or told == "no_guarantee" or (statement and not statement["same_plan"]):
        return "no_guarantee"
    return "exceeded" if (rounds > 0 and is_above(epsilon, target)) or told == "exceeded" else "within"


def is_refuted(audit: Json, site: str, epsilon: float) -> bool:
    """Whether an attack's right guesses deny the epsilon (Steinke, Nasr and Jagielski 2023, Theorem 5.2)."""
    refuted = bool(audit["exceeded"])
    for bound in audit["bounds"]:
        if bound["site"] in (site, None):
            guesses, right = bound["guesses"], bound["correct"]
            hits = binom.pmf(np.arange(guesses + 1), guesses, expit(min(epsilon, bound["claimed_epsilon"])))
            below = np.cumsum(hits[:right][::-1]) / np.arange(1, right + 1)
            chance = hits[right:].sum() + 2 * bound["canaries"] * audit["delta"] * below.max(initial=0.0)
            refuted |= bool(chance < (1 - audit["confidence"]) / len(audit["bounds"]))
    return refuted


def check_ledger(report: Json, keys: dict[str, str] | None, signer: str) -> tuple[str, float]:
    """The verdict and the epsilon of a ledger."""
    facts = report["facts"]
    site, found, delta = facts["site"], facts["verification"], facts["delta"]
    require(found is None or not signer or found["site_key"] == signer, "its ledger is another key's")
    require(keys is None or keys.get(site) == signer, f"the roster has another key of {site}")
    check_charges(facts)
    epsilon_by_filter = partial(filter_epsilon, order=facts["order"], delta=delta)
    cohorts = [0, *(span_of(run["plan"])[0] for run in facts["runs"])]
    of_all = [[charged_to(facts, cohort, period=period) for cohort in cohorts] for period in (False, True)]
    spent, in_period = (max(one, key=epsilon_by_filter) for one in of_all)
    epsilon, life = epsilon_by_filter(spent), report["sites"][0]["lifetime"]
    check_epsilon("epsilon of all runs", life["epsilon"], epsilon)
    check_epsilon("epsilon of the period", life["period_epsilon"], of_period := epsilon_by_filter(in_period))
    caps, something, approved = facts["caps"], bool(spent), facts["approved"]
    charges = sum(entry["rounds"] if entry["run"] else 1 for entry in facts["charges"])
    ends = zip(caps, [*(cap["charges_before"] for cap in caps[1:]), charges], strict=True)
    without_cap = something and approved["max_epsilon"] is None
    without_cap |= any(cap["max_epsilon"] is None and cap["charges_before"] < end for cap, end in ends)
    seeded = facts["lost_seed"] or any(run["seeded_noise"] for run in facts["runs"])
    if found is None or facts["in_doubt"] or seeded or without_cap or math.isinf(epsilon):
        return "no_guarantee", epsilon
    planned = {run["run"]: number(run["planned_epsilon"]) for run in life["runs"]}
    totals = ((epsilon, "max_epsilon"), (of_period, "max_epsilon_per_period"))
    above = [is_above(total, number(approved[cap])) for total, cap in totals]
    for run in facts["runs"]:
        whole = epsilon_of(events_of(run["plan"], max_rounds(run["plan"])), delta)
        check_epsilon(f"the plan of {run['run']}", planned[run["run"]], whole)
        above.append(is_above(whole, number(run["max_epsilon"]) * (1 + 1e-3)))
    return ("exceeded" if any(above) else "within"), epsilon


def check_charges(facts: Json) -> None:
    """Refuse contradictory facts of a ledger: a run listed twice or without its charges, or charges without a run."""
    plans, charges, delta = {run["run"]: run["plan"] for run in facts["runs"]}, facts["charges"], facts["delta"]
    require("" not in plans and len(plans) == len(facts["runs"]), "it lists a run twice")
    for name, plan in plans.items():
        rounds = sum(one["rounds"] for one in charges if one["run"] == name)
        sent = sum(one["count"] for one in facts["releases"] if (one["kind"], one["run"]) == ("update", name))
        require(sent <= rounds <= max_rounds(plan), f"{name} was charged {rounds} rounds, and {sent} updates left")
        require((plan["unit"], plan["delta"]) == (facts["unit"], delta), f"{name} has another unit or delta")
    for one in charges:
        of_run = one["run"] in plans and one["rounds"] > 0 and not one["lost"]
        require(of_run == (one["entry"] is None), "a charge belongs neither to a run nor to lost rounds")
    days = [one["day"][:10] for one in (*charges, {"day": facts["date"]})]
    require(days == sorted(days), "its charges are not in order, or later than the report")


def charged_to(facts: Json, cohort: int, *, period: bool) -> dict[Event, int]:
    """All that was charged to people of a cohort, perhaps in the newest entry's calendar period alone."""
    plans, total = {run["run"]: run["plan"] for run in facts["runs"]}, dict[Event, int]()

    def period_of(day: str) -> int:
        moment = date.fromisoformat(day[:10])
        return (12 * moment.year + moment.month - 1) // MONTHS[facts["approved"]["period"]]

    rows = [number for number, entry in enumerate(facts["charges"]) if entry["lost_rows"]]
    for place, entry in enumerate(facts["charges"]):
        if period and period_of(entry["day"]) != period_of(facts["date"]):
            continue
        owed = cohort == 0 and bool(rows) and place <= rows[-1]
        found = [(event_of(one["event"]), one["count"]) for one in entry["lost"]]  # counted for everybody
        if entry["run"]:
            first, last = span_of(plans[entry["run"]])
            if owed or first <= cohort <= last:
                found += events_of(plans[entry["run"]], entry["rounds"]).items()
        for event, count in found:
            total[event] = total.get(event, 0) + count
    return total


def span_of(plan: Json) -> tuple[int, float]:
    """The first and the last cohort that a plan admits; everybody, where people have no arrivals."""
    if (cohorts := plan["cohorts"]) is None:
        return 0, math.inf
    first, last = (cohorts[key] and number_of(cohorts[key]) for key in ("first", "last"))
    return int(first or 0), float(last)


def number_of(name: str) -> int:
    """The number of a calendar period: 2026, 2026-Q1 or 2026-03."""
    year, _, part = name.partition("-")
    if part.startswith("Q"):
        return 4 * int(year) + int(part[1:]) - 1
    return 12 * int(year) + int(part) - 1 if part else int(year)


def event_of(charged: Json) -> Event:
    if charged["kind"] == "poisson_sampled":
        return mechanism("gaussian", charged["sampling_probability"], charged["event"]["noise_multiplier"])
    noise = "laplace" if charged["kind"] == "laplace" else "gaussian"
    return mechanism(noise, 1.0, charged.get("noise_multiplier", 0.0))


def number(epsilon: float | None) -> float:
    return math.inf if epsilon is None else float(epsilon)


def is_above(found: float, bound: float) -> bool:
    """Whether an epsilon that this program found shows that a bound was exceeded, though it may be too large."""
    return found * (1 - SLACK) > bound * (1 + LAST_DIGITS)


def check_epsilon(name: str, said: float | None, found: float) -> None:
    """A report may say more; less than this upper bound only by what that is too large."""
    right = number(said) >= found * (1 - SLACK) - 1e-6
    require(right, f"{name}: the report says {said}, found at most {found:.6g}")


def check_files(facts: Json, folder: Path) -> None:
    """Compare the model's files with those that the report names."""
    files = facts["files"]
    if not files:
        require(not folder.is_dir(), f"{folder} is there, and the report names no model")
        return
    require(folder.is_dir(), f"the model was not compared: there is no {folder}; give --model")
    there, tops = dict[str, str](), {name.partition("/")[0] for name in files}
    named = [{n.removeprefix(f"{top}/"): d for n, d in files.items() if n.startswith(f"{top}/")} for top in tops]
    for path in folder.rglob("*"):
        require((path.is_file() or path.is_dir()) and not path.is_symlink(), f"{path} is a link, a pipe or a device")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in BESIDE_MODEL:
            there[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    require(there in named, f"{folder} has other files than the model that the report is about")
    if facts["settings"].get("runtime") == "deployment":
        own = {name.removeprefix("adapter/"): digest for name, digest in files.items() if name.startswith("adapter/")}
        require(there == own, f"the lead states that {folder} was made from the adapter; sites did not sign it")
        check_signed_adapter(facts, folder)


def head_names(sent: Json, found: set[str]) -> set[str]:
    """The names of a head's tensors by the sent settings; if another package's task trains it, all that are `found`."""
    if sent["task"] not in HEADS:
        return found if sent["head"]["train"] else set()
    if sent["data"]["input"] == "features":
        count = len(sent["head"]["hidden"])  # each of these layers is followed by a ReLU
        layers = [f"{2 * number}." for number in range(count + 1)] if count else [""]
        return {layer + part for layer in layers for part in ("weight", "bias")}
    centered = sent["data"]["input"] == "text" and sent["task"] != "token_classification"
    return {"weight", *(["center"] if centered else []), *(["candidates"] if sent["task"] == "votes" else [])}


def trained_digest(folder: Path, sent: Json) -> tuple[str, list[str]]:
    """The digest of the tensors that a run trains by the sent settings, which sites sign, and the adapted modules."""
    kind, frozen, trained = TENSORS[sent["lora"]["kind"]], sent["task"] == "votes", dict[str, Any]()
    files = [*kind, *(["head"] if HEADS.get(sent["task"], (folder / "head.safetensors").is_file()) else [])]
    names = {"fedtune.json", *(["adapter_config.json"] if kind else []), *(f"{file}.safetensors" for file in files)}
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - BESIDE_MODEL
    require(others == names, f"{folder} has other files than {', '.join(sorted(names))}")
    read = {file: (folder / f"{file}.safetensors").read_bytes() for file in files}
    starts = {file: 8 + int.from_bytes(data[:8], "little") for file, data in read.items()}
    heads = {file: json.loads(data[8 : starts[file]]) for file, data in read.items()}
    last = next(reversed(kind), "head")
    ending = kind[last][-1] if kind else ""
    modules = {name.removesuffix(ending) for name in heads[last] if name.endswith(ending)} if kind else set()
    for file, tensors in heads.items():
        tensors.pop("__metadata__", None)
        of_head = file == "head"
        right = head_names(sent, {*tensors}) if of_head else {one + ends for one in modules for ends in kind[file]}
        require(tensors.keys() == right, f"{file}.safetensors has other tensors than the settings require")
        for name, about in tensors.items():
            still = frozen or name.endswith((IA3, NORMS)) or (name.endswith(A) and not sent["lora"]["train_a"])
            if of_head:
                still = name in ("center", "candidates") or not sent["head"]["train"]
            if not still:
                first, end = (starts[file] + place for place in about["data_offsets"])
                name = "head." * of_head + name
                require(about["dtype"] == "F32" and name not in trained, f"{file} has an odd tensor {name}")
                trained[name] = about["shape"], read[file][first:end]
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(trained.items()):
        digest.update(json.dumps([name, "float32", shape], separators=(",", ":")).encode() + b"\n" + values)
    return digest.hexdigest(), sorted(name.removeprefix("base_model.model.") for name in modules)


def check_peft_settings(own: Json, sent: Json, model: Json, modules: list[str]) -> None:
    """Compare what PEFT reads with what follows from the sent settings and the signed modules; the rest is empty."""
    lora, usual = sent["lora"], {key: value for key, value in PEFT.items() if key in own}
    task = "CAUSAL_LM" if sent["task"] in ("causal_lm", "preference") else "FEATURE_EXTRACTION"
    usual |= {"task_type": task, "revision": model["revision"], "peft_type": "IA3", "target_modules": modules}
    if lora["kind"] != "ia3":
        places = [re.split(r"\.(\d+)\.", one, maxsplit=1) for one in modules]  # stack, layer, module
        last = {name.rpartition(".")[2] for name in modules}
        named = sorted(last if isinstance(lora["target_modules"], str) else lora["target_modules"])
        usual |= {"peft_type": "LORA", "r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": named}
        usual |= {"use_rslora": lora["rslora"], "use_dora": lora["kind"] == "dora"}
        usual["layers_to_transform"] = sorted({int(layer) for _, layer, _ in places})
        usual["layers_pattern"] = places[0][0].rpartition(".")[2]
    compared = {*own, *usual} - {"base_model_name_or_path", "fan_in_fan_out", "peft_version"}
    odd = sorted(key for key in compared if (own.get(key) or None) != (usual.get(key) or None))
    require(not odd, f"adapter_config.json does not follow from the settings that the sites were sent: {odd}")


def value_names(features: list[Json]) -> list[str]:  # as fedtune.json names the values of a record
    found = list[str]()
    for one in features:
        low, high = map(float, one["range"] or (0, 0))
        at = [""] if one["size"] is None else [f"[{place}]" for place in range(one["size"])]
        ends = [f" = {name}" for name in one["categories"]] + [": other"]
        ends = ends if one["categories"] else [f"{place} in {low!r} to {high!r}" for place in at]
        ends += [": missing"] * (one["missing"] == "indicator")
        found += [column + end for column in one["columns"] for end in ends]
    return found


def check_signed_adapter(facts: Json, folder: Path) -> None:
    """Compare the adapter's trained tensors with those that each charged site signed in its last receipt."""
    sent, own = json.loads(facts["sent"]), read_json(folder / "fedtune.json")
    digest, modules = trained_digest(folder, sent)
    data, columns = sent["data"], sent["data"]["columns"]
    texts = {"preference": 2, "embedding": 3 if "anchor" in columns else 2, "token_classification": data["windows"]}
    asked = {key: sent[key] for key in ("task", "lora", "head", "seed", "task_settings")} | {"trained_sha256": digest}
    asked |= {key: data[key] for key in ("labels", "target_range", "input")} | {"texts": texts.get(sent["task"], 1)}
    asked |= {"values": value_names(data["features"]), "model": own["model"], "schema_version": own["schema_version"]}
    base = {key: sent["model"][key] for key in ("sha256", "dtype", "gguf_file", "license")}
    same = own == asked and base.items() <= own["model"].items()
    require(same, f"{folder} has other settings than the sites were sent")
    if (path := folder / "adapter_config.json").is_file():
        check_peft_settings(read_json(path), sent, own["model"], modules)
    charged = {site["site"]: site["receipt"] for site in facts["sites"] if rounds_of(facts, site)}
    require(bool(charged), "no site signed the final adapter")
    for name, one in charged.items():
        require(one["ended"] and one["reply"] == digest, f"{name} did not sign that {folder} holds the final adapter")


def verified(path: Path, *, key: str | None, roster: Path | None, model: Path | None) -> str:
    """What holds, in a sentence; raises Wrong where anything does not."""
    report = read_json(path := path / "report.json" if path.is_dir() else path)
    require(report.get("schema_version") == SCHEMA, f"it is no report of schema version {SCHEMA}")
    facts = report["facts"]
    of_run, settings = facts["kind"] == "run", facts["settings"]
    simulated = settings.get("runtime") != "deployment" if of_run else facts["simulated"]
    signer = "" if simulated and report["signature"] is None and key is None else signer_of(report)
    require(key in (None, signer), f"it is signed by {signer}")
    require(simulated or key is not None or roster is not None, "nobody compared whose signature it is: give --key")
    listed = members(roster, signer if of_run else "") if roster else []
    keys = {one["site"]: one["site_key"] for one in listed} if roster else None
    require(0 < (delta := facts["plan"]["delta"] if of_run else facts["delta"]) < 1, f"its delta is {delta}")
    state, epsilon = check_run(report, keys, path.parent) if of_run else check_ledger(report, keys, signer)
    said = report["verdict"]["state"]
    require(said == state, f"its verdict is {said}, found {state}")
    check_epsilon("epsilon", report["epsilon"], epsilon)
    if of_run:
        check_files(facts, model or path.parent / "adapter")
    require(of_run or report["sites"][0]["spent"]["epsilon"] == report["epsilon"], "its site has another epsilon")
    whose = "a simulation: one machine held all keys" if simulated else f"signed by {signer}"
    own = {site["site"] for site in report["sites"]}
    left = [one for one in listed if one["site"] in own and one.get("revoked")]
    whose += "".join(f"; {one['site']} was revoked at {one['revoked']}" for one in left)
    return f"{said}: epsilon {number(report['epsilon']):.6g} at delta {delta:g} ({whose})"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a fedtune report.json without fedtune.")
    parser.add_argument("report", type=Path, help="a report.json, or a folder that holds one")
    parser.add_argument("--key", help="the public key that must have signed it, from a source that you trust")
    parser.add_argument("--roster", type=Path, help="the federation's roster.json, with the sites' keys")
    parser.add_argument("--model", type=Path, help="the model's folder (default: adapter/ beside the report)")
    given = parser.parse_args(words)
    try:
        print("HOLDS", verified(given.report, key=given.key, roster=given.roster, model=given.model))
    except (Wrong, OSError, *MALFORMED) as error:
        print(f"DOES NOT HOLD: {error if isinstance(error, Wrong) else f'{type(error).__name__}: {error}'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
