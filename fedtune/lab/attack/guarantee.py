"""What a run's guarantee allows an attack at most, from the mechanism's own trade-off curve.

An attack on membership with false positive rate a has a true positive rate of at most B(a), the curve of
`report.derive.profile.bound_hit_rate`.  The same curve bounds reconstruction: whoever guesses a secret out of N equally
likely ones without the record is right with probability 1 / N, and with the record with at most B(1 / N)
(reconstruction robustness; Balle, Cherubin and Hayes 2022, arXiv 2201.04845; Hayes, Mahloujifar and Balle 2023, arXiv
2302.07225).  All bounds hold for an attacker who knows everything but the one record or person.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from fedtune.formatting import pluralize
from fedtune.privacy.events import Spent
from fedtune.privacy.run_plan import Plan
from fedtune.report.attacks import AttackFinding
from fedtune.report.derive import profile

CANDIDATES = (100, 10_000, 1_000_000)
"""Sizes of secrets: two digits, a four-digit number, a date of birth with a sex, or six digits."""
_SHOWN = 10_000
_RATES = (0.0, *(10.0**-power for power in range(6, 2, -1)), 0.003, 0.01, 0.03, *(n / 20 for n in range(2, 21)))
"""False positive rates between which the curve is bounded by a step."""


def bound_membership_auroc(spent: Spent) -> float | None:
    """Bound the area under the ROC curve of any membership attack on the mechanism; None: unbounded."""
    found = [profile.bound_hit_rate(spent, false_alarms=rate) for rate in _RATES[1:]]
    if any(rate is None for rate in found):
        return None
    steps = zip(pairwise(_RATES), found, strict=True)
    return min(1.0, sum((right - left) * (rate or 0.0) for (left, right), rate in steps))


def bound_reconstruction(plan: Plan, *, rounds: int) -> dict[int, float | None]:
    """Bound the chance that a secret out of N equally likely ones is rebuilt from `rounds` rounds, by N; None:
    unbounded.
    """
    spent = profile.count_charged_events(plan, rounds)
    return {count: profile.bound_hit_rate(spent, false_alarms=1 / count) for count in CANDIDATES}


def describe_reconstruction(plan: Plan) -> AttackFinding:
    """Describe the chance that a secret is rebuilt, from the final model and from one update of a site.

    No attack is made: a run folder keeps no single update, and the bound holds for every attack.
    """
    unit = "person" if plan.unit == "user" else "record"
    describe = partial(
        AttackFinding, attack="reconstruction", measure=f"chance for 1 of {_SHOWN:,}", guessing=1 / _SHOWN
    )
    if not plan.private:
        none = "The run has no privacy guarantee: whoever sees an update may rebuild records from it."
        return describe(sentence=none)
    whole, one = (bound_reconstruction(plan, rounds=rounds) for rounds in (plan.most_rounds, 1))
    figures = {f"run_1_in_{count}": chance for count, chance in whole.items()}
    figures |= {f"update_1_in_{count}": chance for count, chance in one.items()}
    told = [
        f"{_format_chance(bounds[_SHOWN])} from {what}"
        for bounds, what in ((one, "one update of a site"), (whole, "everything that the run released"))
    ]
    said = f"A secret of one {unit} that is one of {_SHOWN:,} equally likely ones is rebuilt with a chance of at most "
    said += f"{' and '.join(told)}; guessing has {_format_chance(1 / _SHOWN)}."
    return describe(sentence=said, ceiling=whole[_SHOWN], figures=figures)


def describe_site_protection(plan: Plan, smallest: int) -> str:
    """Describe in one sentence why the membership of a whole site is never protected."""
    unit = "user" if plan.unit == "user" else "record"
    who = f"the guarantee is for one {unit}, and the smallest site has {pluralize(smallest, 'record')}"
    return f"Membership of a site is never protected: {who}, and the lead names all sites in run.json."


def _format_chance(chance: float | None) -> str:
    return "100 %" if chance is None else f"{100 * chance:.2g} %"
