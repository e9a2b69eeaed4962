"""Faults of what is counted, and of what epsilon is made of it."""

from .mutant import Mutant

ACCOUNTANT, FILTER, PLAN = (
    "fedtune/privacy/accountant.py", "fedtune/privacy/filter.py", "fedtune/privacy/run_plan.py"
)  # fmt: skip
HISTORY, POLICY = "fedtune/privacy/ledger/history.py", "fedtune/privacy/site_policy.py"
OF_FILTER = ("tests/privacy/test_filter.py",)
LOSSES, OF_LOSSES = "fedtune/privacy/loss_distribution.py", "tests/privacy/test_loss_distribution.py"
OF_ACCOUNTANT = "tests/privacy/test_accountant.py"
CHARGED = "            self._charges.append((event.sequence, moment, part, count))"

ACCOUNTING = (
    Mutant(
        name="accountant-reset-each-round",
        fault="Only the newest round counts, as where a new accountant is made each round (Flower's Opacus example: "
        "1.43 reported, 5.62 true after 20 rounds).",
        file=HISTORY,
        old=CHARGED,
        new="            self._charges = [(event.sequence, moment, part, count)]",
        tests=("tests/privacy/test_spending.py",),
    ),
    Mutant(
        name="steps-under-counted",
        fault="A round is accounted as one step, however many noisy steps it takes.",
        file=PLAN,
        old="            steps=self.local_steps * rounds,",
        new="            steps=rounds,",
        tests=("tests/privacy/test_run_plan.py",),
    ),
    Mutant(
        name="a-plan-with-two-digests",
        fault="A run that was denied comes back with 1 in place of 1.0, and is another one to the ledger.",
        file=PLAN,
        old="float(getattr(self, name)) + 0.0)",
        new="getattr(self, name))",
        tests=("tests/privacy/test_run_plan.py::test_a_number_has_one_digest_however_it_is_written",),
    ),
    Mutant(
        name="spare-rounds-not-paid-for",
        fault="Noise is calibrated for the planned rounds, and retries come on top.",
        file=PLAN,
        old="steps = local_steps * (num_rounds + spare_rounds)",
        new="steps = local_steps * num_rounds",
        tests=("tests/privacy/test_run_plan.py",),
    ),
    Mutant(
        name="scores-not-charged",
        fault="Noised scores are released each round and are no part of what is accounted.",
        file=PLAN,
        old="        scores = _scores(self.metrics_noise_multiplier, rounds)\n",
        new="        scores = _scores(0.0, rounds)\n",
        tests=("tests/privacy/test_run_plan.py",),
    ),
    Mutant(
        name="optimistic-pld",
        fault="Privacy losses are rounded down to the grid instead of up: an estimate in the place of a bound.",
        file=LOSSES,
        old="_grid(lowest, highest + 2 - lowest, width), adding",
        new="_grid(lowest + 1, highest + 2 - lowest, width), adding",
        tests=(f"{OF_ACCOUNTANT}::test_pld_gives_the_golden_epsilon",),
    ),
    Mutant(
        name="rounding-of-a-composition-not-counted",
        fault="What Fourier transforms round away is not added to delta.",
        file=LOSSES,
        old="1.1 * (composing + going_back + before",
        new="0 * (composing + going_back + before",
        tests=(f"{OF_LOSSES}::test_composing_errs_by_less_than_is_counted",),
    ),
    Mutant(
        name="composed-without-a-tilt",
        fault="A tail is composed as it is, so that its rounding is that of the largest probability and not its own.",
        file=LOSSES,
        old="        return self.tail(tilt).epsilon(delta)",
        new="        return self.tail(0.0).epsilon(delta)",
        tests=(f"{OF_LOSSES}::test_what_a_run_at_a_tiny_delta_spends_is_not_hidden_by_rounding",),
    ),
    Mutant(
        name="one-order-of-neighbours",
        fault="Only a unit that is left out is looked at, and not one that is added.",
        file=LOSSES,
        old="            for adding in (False, True)",
        new="            for adding in (True,)",
        tests=(f"{OF_LOSSES}::test_epsilon_is_never_below_the_exact_one_and_little_above",),
    ),
    Mutant(
        name="infinite-losses-once",
        fault="What a step's grid leaves out counts once, however many steps there are.",
        file=LOSSES,
        old="math.fsum(count * math.log1p(-step.infinite)",
        new="math.fsum(math.log1p(-step.infinite)",
        tests=(f"{OF_LOSSES}::test_a_delta_that_the_arithmetic_does_not_carry_is_refused",),
    ),
    Mutant(
        name="a-delta-below-the-arithmetic",
        fault="A plan may have a delta so small that no epsilon can be computed.",
        file=ACCOUNTANT,
        old="LEAST_DELTA_A_STEP * steps)",
        new="0.0)",
        tests=(f"{OF_LOSSES}::test_a_delta_that_the_arithmetic_does_not_carry_is_refused",),
    ),
    Mutant(
        name="noise-rounded-to-the-nearest",
        fault="Calibrated noise is rounded to two digits, down as well as up, and the target is overshot.",
        file=ACCOUNTANT,
        old="""    noise = math.ceil(high * 1e4) / 1e4
    while epsilon_at(noise) > epsilon or epsilon_pld([at_noise(noise), *also], delta) > epsilon:
        noise = round(noise + 1e-4, 4)
    return noise
""",
        new="    return round(high, 2)\n",
        tests=(f"{OF_ACCOUNTANT}::test_calibrated_noise_keeps_within_the_target_and_wastes_little",),
    ),
    Mutant(
        name="surcharge-forgotten",
        fault="A Renyi divergence is shown as if it were an epsilon, without what the conversion adds.",
        file=FILTER,
        old="max(0.0, divergence_sum + surcharge(order, delta))",
        new="max(0.0, divergence_sum)",
        tests=OF_FILTER,
    ),
    Mutant(
        name="order-from-the-wrong-side",
        fault="The filter's order is the one at which the reference plan takes the largest share of the cap (at order "
        "66 a budget of 9 is spent as one of 66).",
        file=FILTER,
        old="divergence / usable[order]",
        new="usable[order] / divergence",
        tests=OF_FILTER,
    ),
    Mutant(
        name="order-chosen-in-hindsight",
        fault="The filter's order changes with the policy after outputs were seen; the filter is a proof only for an "
        "order that was fixed before.",
        file=HISTORY,
        old="                self.policies.append((event.time, self.policy.budget.max_epsilon))",
        new="                self.policies.append((event.time, self.policy.budget.max_epsilon))\n"
        "                self.order = self.policy.budget.order()",
        tests=("tests/privacy/test_ledger.py::test_another_reference_does_not_move_the_filters_order",),
    ),
    Mutant(
        name="rounding-as-a-refund",
        fault="A divergence that rounding puts below zero is kept, and repeating a cheap event earns budget.",
        file=FILTER,
        old="return 0.0 if found < 0 else found",
        new="return found",
        tests=OF_FILTER,
    ),
    Mutant(
        name="delta-of-the-largest-data-set",
        fault="Delta is checked against the largest declared size: over all data sets of a population it may be larger "
        "than one over their size, and a whole record may be published.",
        file=POLICY,
        old="return sum(dataset.declared_size",
        new="return max(dataset.declared_size",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="a-run-s-cap-without-spare-rounds",
        fault="The cap on a run is checked against its planned rounds, and not against those it may be charged for.",
        file=POLICY,
        old="accountant.epsilon_above([plan.whole],",
        new="accountant.epsilon_above([plan.event(rounds=plan.num_rounds)],",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="scores-with-too-little-noise",
        fault="The site's least noise is asked of the largest of a plan's noises only.",
        file=POLICY,
        old="(Reason.MIN_NOISE_MULTIPLIER, min(plan.noises), limits.min_noise_multiplier)",
        new="(Reason.MIN_NOISE_MULTIPLIER, max(plan.noises), limits.min_noise_multiplier)",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="no-floor-of-the-clip-norm",
        fault="A lead may ask for a clip norm so small that what is clipped is mostly rounding.",
        file=POLICY,
        old="(Reason.MIN_GRAD_NORM, plan.max_grad_norm, limits.min_grad_norm)",
        new="(Reason.MIN_GRAD_NORM, plan.max_grad_norm, 0.0)",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="adapter-bound-without-the-root",
        fault="The bound on an adapter's values does not follow the scale, although what the model sees is "
        "the product of two matrices times it.",
        file="fedtune/privacy/site_policy.py",
        old="max_adapter_value / math.sqrt(max(1.0, lora_scale))",
        new="max_adapter_value",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="a-silent-site-spends-nothing",
        fault="The lead counts no round of a site that did not answer, although it may have trained.",
        file="fedtune/federation/results.py",
        old="rounds = max(charged, min(charged + silent, plan.most_rounds))",
        new="rounds = charged",
        tests=("tests/federation/test_lead.py",),
    ),
    Mutant(
        name="search-costs-one-trial",
        fault="The price of a search is that of its dearest trial.",
        file="fedtune/privacy/selection.py",
        old="        epsilon=accountant.epsilon_pld(wholes, delta),",
        new="        epsilon=max(accountant.epsilon_pld([whole], delta) for whole in wholes),",
        tests=("tests/privacy/test_selection.py",),
    ),
)
