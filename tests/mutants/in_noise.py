"""Faults of the noise and of where it comes from."""

from .mutant import Mutant

MECHANISM, RANDOMNESS, STEP = (
    "fedtune/privacy/mechanism.py", "fedtune/privacy/randomness.py", "fedtune/training/dp_step.py"
)  # fmt: skip
ADDED = """{
        name: total + stream.rounded_normal(total.size, deviation).reshape(total.shape) for name, total in sums.items()
    }"""
WHOLE = "        whole = np.rint(values)\n"
OF_MECHANISM = ("tests/privacy/test_mechanism.py",)
OF_STEP = ("tests/training/test_step_faults.py",)
OF_STREAM = ("tests/privacy/test_randomness.py",)
RECOVERY = "tests/statistics/test_seed_recovery.py"

NOISE = (
    Mutant(
        name="a-score-in-every-group",
        fault="A held-out record's score is added to every group's sum, while the noise is that of one.",
        file=MECHANISM,
        old="    np.add.at(pairs[:, 0], places, in_cells)\n",
        new="    pairs[:, 0] = in_cells.sum()\n",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="noise-shared-by-groups",
        fault="The noise of scores by group is divided among the groups, as if each had a share of a record.",
        file=MECHANISM,
        old="stream=stream, sensitivity=root)",
        new="stream=stream, sensitivity=root / num_groups)",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="no-noise",
        fault="Sums are clipped and released without noise, while epsilon is reported as before.",
        file=MECHANISM,
        old=ADDED,
        new="{name: total.copy() for name, total in sums.items()}",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="half-the-noise",
        fault="The noise has half the stated standard deviation.",
        file=MECHANISM,
        old="deviation = noise_multiplier * sensitivity",
        new="deviation = 0.5 * noise_multiplier * sensitivity",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="noise-for-another-clip-norm",
        fault="The noise is scaled for a clip norm of 1 whatever the clip norm is, as where sensitivity is a setting "
        "of its own (Flower's LocalDpMod).",
        file=STEP,
        old="noise_multiplier=plan.noise_multiplier,",
        new="noise_multiplier=plan.noise_multiplier / plan.max_grad_norm,",
        tests=OF_STEP,
    ),
    Mutant(
        name="noise-once-a-micro-batch",
        fault="Noise is added to each micro-batch instead of once to the logical batch, so its amount depends on how "
        "the batch is cut, and an empty batch gets none.",
        file=STEP,
        old="""    sums = sampled_sum(gradients, records, plan, parameters=parameters, sampling=sampling)
    noisy = add_gaussian_noise(sums, noise_multiplier=plan.noise_multiplier, stream=noise)
""",
        new="""    noisy = {name: total.numpy() for name, total in zeros(parameters).items()}
    for batch in records.cut(poisson_sample(records.count, plan.sampling_rate, sampling)):
        sums = zeros(parameters)
        add_clipped(sums, gradients.of(batch), plan.max_grad_norm)
        exact = {name: total.cpu().numpy() for name, total in sums.items()}
        part = add_gaussian_noise(exact, noise_multiplier=plan.noise_multiplier, stream=noise)
        noisy = {name: total + part[name] for name, total in noisy.items()}
""",
        tests=OF_STEP,
    ),
    Mutant(
        name="stepped-before-the-noise",
        fault="Noise is drawn and charged, but the optimizer steps on the sum from before it, and that is released.",
        file=STEP,
        old="descend(noisy, parameters, optimizer,",
        new="descend({name: total.cpu().numpy() for name, total in sums.items()}, parameters, optimizer,",
        tests=OF_STEP,
    ),
    Mutant(
        name="a-tensor-without-noise",
        fault="The task head is clipped and released, but gets no noise.",
        file=MECHANISM,
        old=ADDED,
        new="""{
        name: total
        if name.startswith("head.")
        else total + stream.rounded_normal(total.size, deviation).reshape(total.shape)
        for name, total in sums.items()
    }""",
        tests=(*OF_MECHANISM, *OF_STEP),
    ),
    Mutant(
        name="one-noise-for-all-tensors",
        fault="All tensors get the same noise values, so the difference of two of them has none.",
        file=MECHANISM,
        old=ADDED,
        new="""(
        lambda same: {name: total + same[: total.size].reshape(total.shape) for name, total in sums.items()}
    )(stream.rounded_normal(max(total.size for total in sums.values()), deviation))""",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="noise-rounded-to-integers",
        fault="The noise is rounded to whole clip norms, as for sums of counts; below half of one nothing of it is "
        "left.",
        file=MECHANISM,
        old="stream.rounded_normal(total.size, deviation).reshape",
        new="(stream.rounded_normal(total.size, noise_multiplier * sensitivity) << GRID_BITS).reshape",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="seeded-torch-generator",
        fault="Noise comes from a torch generator that is seeded with the time, as of a common default: a search of a "
        "day's seconds finds it.",
        file=MECHANISM,
        old="    return " + ADDED,
        new="""    import time

    import torch

    generator = torch.Generator().manual_seed(int(time.time()))
    return {
        name: total
        + (deviation * torch.randn(total.shape, generator=generator, dtype=torch.float64).numpy()).astype(np.int64)
        for name, total in sums.items()
    }""",
        tests=(f"{RECOVERY}::test_in_a_real_round_there_is_nothing_to_find",),
    ),
    Mutant(
        name="seed-of-sixteen-bits",
        fault="The operating system's bits are cut to a small seed of numpy's generator, which is no CSPRNG.",
        file=RANDOMNESS,
        old="        pairs = -(-count // 2)\n",
        new="        seed = int(self.uniform64(1)[0]) & 0xFFFF\n"
        "        return np.rint(deviation * np.random.default_rng(seed).standard_normal(count)).astype(np.int64)\n"
        "        pairs = -(-count // 2)\n",
        tests=(f"{RECOVERY}::test_in_a_real_round_there_is_nothing_to_find",),
    ),
    Mutant(
        name="noise-from-the-run-s-seed",
        fault="Noise is made from the run's `seed`, which the lead chose and knows.",
        file="fedtune/sites/work.py",
        old="return SeededRandomness(seed) if seeded else SystemRandomness()",
        new="return SeededRandomness(seed)",
        tests=(
            f"{RECOVERY}::test_in_a_whole_run_there_is_nothing_to_find",
            "tests/sites/test_work.py",
        ),
    ),
    Mutant(
        name="one-key-for-all-streams",
        fault="The key is made once in a process, so every round, site and run adds the same noise.",
        file=RANDOMNESS,
        old="        return RandomStream(os.urandom(32))",
        new="""        if not hasattr(SystemRandomness, "key"):
            SystemRandomness.key = os.urandom(32)
        return RandomStream(SystemRandomness.key)""",
        tests=("tests/statistics/test_independence.py",),
    ),
    Mutant(
        name="single-draws",
        fault="A noise value is one transformed pair of uniform floats, whose 53 bits leave holes in its output "
        "(Mironov 2012) and end its tails.",
        file=RANDOMNESS,
        old="        values, error = _box_muller(radius_bits, angle_bits, deviation)\n",
        new="        radius_bits = (radius_bits >> np.uint64(11)) + np.uint64(1) << np.uint64(11)\n"
        "        values, error = _box_muller(radius_bits, angle_bits, deviation)\n",
        tests=OF_STREAM,
    ),
    Mutant(
        name="a-pair-kept-together",
        fault="A pair's cosine is handed out twice instead of its sine, so that half of the noise repeats the other.",
        file=RANDOMNESS,
        old="np.stack([np.cos(angle), np.sin(angle)])",
        new="np.stack([np.cos(angle), np.cos(angle)])",
        tests=("tests/privacy/test_draws.py", *OF_STREAM),
    ),
    Mutant(
        name="cut-tails",
        fault="Noise is cut at three standard deviations: an output beyond them names its data set.",
        file=RANDOMNESS,
        old=WHOLE,
        new="        values = np.clip(values, -3 * deviation, 3 * deviation)\n" + WHOLE,
        tests=OF_STREAM,
    ),
    Mutant(
        name="noise-of-another-grid",
        fault="Noise is made for cells of a 2**23rd of a clip norm, and added to sums in cells of a 2**24th.",
        file=MECHANISM,
        old="deviation = noise_multiplier * sensitivity * 2.0**GRID_BITS",
        new="deviation = noise_multiplier * sensitivity * 2.0**23",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="floats-never-in-doubt",
        fault="A float is rounded to a whole number however near it lies to the middle between two, so that what "
        "floats leave out shows as whole numbers that come too often or too rarely.",
        file=RANDOMNESS,
        old="            in_doubt = ~(np.abs(np.abs(values - whole) - 0.5) > error)\n",
        new="            in_doubt = np.zeros(values.shape, dtype=np.bool_)\n",
        tests=(f"{OF_STREAM[0]}::test_a_value_next_to_the_middle_between_two_integers_is_decided_by_more_bits",),
    ),
    Mutant(
        name="error-below-zero",
        fault="The error bound of a float is minus infinity where its radius is minus zero, and so the value counts as "
        "decided; fedtune's own, before a test found it.",
        file=RANDOMNESS,
        old="np.sqrt(2.0 * np.abs(np.log(radius_bits.astype(np.float64) * 2.0**-64)))",
        new="np.sqrt(-2.0 * np.log(radius_bits.astype(np.float64) * 2.0**-64))",
        tests=(f"{OF_STREAM[0]}::test_a_radius_next_to_zero_is_not_taken_for_zero",),
    ),
    Mutant(
        name="error-a-thousandth",
        fault="The error bound of a float is smaller than its error.",
        file=RANDOMNESS,
        old="    return values, error\n",
        new="    return values, error / 1000\n",
        tests=(f"{OF_STREAM[0]}::test_floats_are_as_near_as_their_stated_error",),
    ),
    Mutant(
        name="cut-off-instead-of-rounded",
        fault="Noise is cut off towards zero, so that zero comes twice as often as it should.",
        file=RANDOMNESS,
        old=WHOLE,
        new="        whole = np.trunc(values)\n",
        tests=OF_STREAM,
    ),
)
