"""Faults of what is said of a run: a report's verdict and cells, what `report verify` passes, how scores compare."""

from .mutant import Mutant

VERDICTS, FACTS, RULES = (f"fedtune/report/derive/{name}.py" for name in ("verdicts", "facts", "rules"))
OF_LEDGER, CONTRADICTIONS, RECOMPUTE = (
    f"tests/report/test_{name}.py" for name in ("from_ledger", "contradictions", "recompute")
)
BOOTSTRAP, OF_BOOTSTRAP = "fedtune/evaluation/bootstrap.py", "tests/evaluation/test_bootstrap.py"

REPORT_FAULTS = (
    Mutant(
        name="best-site-gives-the-verdict",
        fault="A report's verdict is that of its most favourable site.",
        file=VERDICTS,
        old="state = min((verdict.state for verdict in several)",
        new="state = max((verdict.state for verdict in several)",
        tests=("tests/report/test_from_run.py::test_an_attack_that_shows_more_than_is_claimed_takes_the_verdict",),
    ),
    Mutant(
        name="plan-above-the-target",
        fault="A run whose plan costs more than its target is within budget as long as less was charged.",
        file=VERDICTS,
        old="rows, planned = site.mechanisms, (spent.epsilon, spent.planned_epsilon)",
        new="rows, planned = site.mechanisms, (spent.epsilon,)",
        tests=(f"{RECOMPUTE}::test_a_plan_above_the_target_is_exceeded_although_less_was_charged",),
    ),
    Mutant(
        name="chosen-runs-called-fixed",
        fault="The mechanism's own curve bounds a run of a ledger that ended early, perhaps because of its results.",
        file=VERDICTS,
        old="return len(charged) == 1 and most.get(charged[0].run) == charged[0].rounds",
        new="return len(charged) == 1 and charged[0].run in most",
        tests=(f"{OF_LEDGER}::test_a_mechanisms_own_curve_bounds_only_what_was_fixed",),
    ),
    Mutant(
        name="spent-before-the-first-cap",
        fault="What was charged while no lifetime cap was in force is covered by a cap that came later.",
        file=FACTS,
        old="cap is None and place < charge and all(",
        new="cap is None and place > charge and all(",
        tests=(f"{OF_LEDGER}::test_caps_before_and_after_what_was_spent",),
    ),
    Mutant(
        name="cap-raised-unsaid",
        fault="A cap that was raised after something was released is not told of.",
        file=FACTS,
        old="place > min(charges) and before is not None",
        new="place < min(charges) and before is not None",
        tests=(f"{OF_LEDGER}::test_caps_before_and_after_what_was_spent",),
    ),
    Mutant(
        name="seed-called-random",
        fault="Noise from a seed counts as unpredictable.",
        file=RULES,
        old='yield "unpredictable_randomness", "violated", "runtime.seeded_noise=true"',
        new='yield "unpredictable_randomness", "verified", "runtime.seeded_noise=true"',
        tests=(f"{CONTRADICTIONS}::test_a_seed_is_predictable",),
    ),
    Mutant(
        name="cells-promise-without-a-guarantee",
        fault="An impact assessment states the figures of a report that promises nothing.",
        file="fedtune/report/derive/cells.py",
        old='promised = verdict.state != "no_guarantee"',
        new='promised = verdict.state != "exceeded"',
        tests=("tests/report/test_cells.py::test_a_run_without_noise_has_nothing_that_bounds_it",),
    ),
    Mutant(
        name="smaller-epsilon-verifies",
        fault="`report verify` accepts an epsilon below the one that the events come to.",
        file="fedtune/report/recompute.py",
        old="if not -under * abs(found) <= said - found <=",
        new="if not said - found <=",
        tests=(f"{RECOMPUTE}::test_an_epsilon_may_be_a_little_larger_and_never_smaller",),
    ),
    Mutant(
        name="unchecked-called-verified",
        fault='`report verify` accepts "verified" where the report\'s own facts bear out less.',
        file=RULES,
        old="if _WORST_FIRST.index(one.status) > _WORST_FIRST.index(best):",
        new="if _WORST_FIRST.index(one.status) < _WORST_FIRST.index(best):",
        tests=(f"{CONTRADICTIONS}::test_nothing_can_be_called_verified_that_nobody_checks",),
    ),
    Mutant(
        name="ensured-called-recomputed",
        fault='`report verify` accepts "verified" for what the program ensures and nobody computed again.',
        file=RULES,
        old='if by_an_earlier_version and best == "ensured"',
        new='if best == "ensured"',
        tests=(f"{CONTRADICTIONS}::test_what_the_program_ensures_was_not_recomputed",),
    ),
    Mutant(
        name="work-of-a-report-unbounded",
        fault="The size of each mechanism is bounded and their number is not: a report of 300 kB keeps who verifies it "
        "busy for an hour.",
        file="fedtune/report/recompute.py",
        old="    if too_much:\n",
        new="    if work < 0:\n",
        tests=("tests/report/test_recompute.py::test_the_work_that_a_small_report_asks_for_is_bounded",),
    ),
    Mutant(
        name="diverged-unsaid",
        fault="A run whose loss is not finite in the end says nothing against its adapter.",
        file="fedtune/federation/results.py",
        old=" or any(finite(score) is None for score in after.values()):",
        new=":",
        tests=("tests/federation/test_results.py",),
    ),
    Mutant(
        name="models-drawn-apart",
        fault="The records for the two models of a comparison are drawn apart: what all records have in common hides a "
        "difference between the models.",
        file=BOOTSTRAP,
        old="values[places] for name, values in figures.items()",
        new="values[places - (figures is tuned)] for name, values in figures.items()",
        tests=(f"{OF_BOOTSTRAP}::test_the_same_units_are_drawn_for_both_models",),
    ),
    Mutant(
        name="users-drawn-as-records",
        fault="Intervals draw records where users are the unit: one person's many records count as much evidence.",
        file=BOOTSTRAP,
        old="_draws(num_units, units, resamples)",
        new="_draws(num_records, None, resamples)",
        tests=(f"{OF_BOOTSTRAP}::test_a_draw_takes_a_user_with_all_records",),
    ),
    Mutant(
        name="card-unescaped",
        fault="Names and licences that people wrote are Markdown and HTML in a model card, and can say what they like.",
        file="fedtune/report/model_card.py",
        old="        finalize=_escaped,",
        new="        finalize=str,",
        tests=("tests/report/test_model_card.py::test_what_people_wrote_is_text_and_no_more",),
    ),
    Mutant(
        name="fixed-though-ended-by-scores",
        fault="A run that its scores ended counts as fixed beforehand: its mechanisms' own curves are shown as bounds.",
        file="fedtune/report/derive/verdicts.py",
        old="    if site.spent and site.spent.ended_by_scores:\n        return False\n",
        new="",
        tests=("tests/end_to_end/test_early_end.py",),
    ),
    Mutant(
        name="fixed-though-there-were-two-runs",
        fault="Two runs in a ledger count as fixed beforehand, though the second may have been chosen by the first.",
        file="fedtune/report/derive/verdicts.py",
        old="    return len(charged) == 1 and most",
        new="    return most",
        tests=("tests/report/test_from_ledger.py::test_a_mechanisms_own_curve_bounds_only_what_was_fixed",),
    ),
    Mutant(
        name="verify-skips-the-search",
        fault="A report may say of the search that its run was picked in whatever it likes.",
        file="fedtune/report/recompute.py",
        old="    found += _selection(report)\n",
        new="",
        tests=("tests/cli/test_search.py::test_a_report_that_plays_the_search_down_is_found",),
    ),
    Mutant(
        name="search-of-any-number",
        fault="A report may name another number of trials than those that were paid for.",
        file="fedtune/report/recompute.py",
        old="    if told.trials != (told.most_trials if mean is None else None):",
        new="    if told.trials is not None and told.trials > told.most_trials:",
        tests=("tests/cli/test_search.py::test_a_report_that_plays_the_search_down_is_found",),
    ),
)
