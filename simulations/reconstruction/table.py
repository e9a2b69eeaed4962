"""The table and the sample of the README, from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import readme

_NAMES = {"none": "no privacy", "8": "epsilon 8", "3": "epsilon 3", "1": "epsilon 1"}


def table(results: Mapping[str, Any]) -> str:
    """Both tables and the sample."""
    return f"{texts(results)}\n\n{members(results)}\n\n{sample(results)}"


def texts(results: Mapping[str, Any]) -> str:
    """What was read of texts and labels."""
    rows = [["", "", "noise", "tokens", "chance", "records exactly", "labels", "chance"]]
    for case, name, outcomes in _lines(results):
        if "tokens" in outcomes[0]:
            exact, all_of_them = sum(o["records"] for o in outcomes), case["records"] * len(outcomes)
            chance = statistics.fmean(o["tokens_chance"] for o in outcomes)
            row = [_spread(outcomes, "tokens"), f"{chance:.4f}", f"{exact} of {all_of_them}"]
            labels = [_spread(outcomes, "labels"), f"{outcomes[0]['labels_chance']:.3f}"]
            rows.append([case["title"], name, f"{outcomes[0]['noise_multiplier']:.2f}", *row, *labels])
    return readme.markdown(rows, texts=2)


def members(results: Mapping[str, Any]) -> str:
    """What was told of membership."""
    rows = [["", "", "noise", "best guesses right", "chance", "AUROC", "members found at 1 % false alarms"]]
    for case, name, outcomes in _lines(results):
        right = statistics.fmean(o["best_guesses"] for o in outcomes)
        row = [f"{right:.3f}", f"{outcomes[0]['best_guesses_chance']:.4f}"]
        # Of one member an AUROC is its rank, and only the mean of ranks compares with what the noise allows.
        row += [_spread(outcomes, "auroc", middle=statistics.fmean)]
        row += [_spread(outcomes, "found_at_1_percent", middle=statistics.fmean)]
        rows.append([case["title"], name, f"{outcomes[0]['noise_multiplier']:.2f}", *row])
    return readme.markdown(rows, texts=2)


def sample(results: Mapping[str, Any]) -> str:
    """A record and what the attack makes of it, for talks."""
    lines = ["```"]
    outcomes = results["one"]["outcomes"]
    for seed in (0, 1, 2):
        of_seed = [o for o in outcomes if o["seed"] == seed]
        lines.append(f"{'the record':<12}{of_seed[0]['true'][0]}")
        lines += [f"{_NAMES[o['privacy']]:<12}{' '.join(o['guess'][0].split())}" for o in of_seed]
        lines.append("")
    return "\n".join([*lines[:-1], "```"])


def _lines(results: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, list[dict[str, Any]]]]:
    """Case, name of the privacy setting and the outcomes of all seeds, a line each."""
    found = []
    for case in results.values():
        for key, name in _NAMES.items():
            outcomes = [o for o in case["outcomes"] if o["privacy"] == key]
            if outcomes:
                found.append((case, name, outcomes))
    return found


def _spread(
    outcomes: Sequence[Mapping[str, Any]], key: str, *, middle: Callable[[list[float]], float] = statistics.median
) -> str:
    values = [outcome[key] for outcome in outcomes]
    return f"{middle(values):.3f} ({min(values):.3f} to {max(values):.3f})"
