"""Faults of the noise and of where it comes from."""

from .mutant import Mutant

MECHANISM, RANDOMNESS, STEP = (
    "fedtune/privacy/mechanism.py", "fedtune/privacy/randomness.py", "fedtune/training/dp_step.py"
)  # fmt: skip
ADDED = "{name: total + scale * stream.normal(total.size).reshape(total.shape) for name, total in sums.items()}"
OF_MECHANISM = ("tests/privacy/test_mechanism.py",)
OF_STEP = ("tests/training/test_noise.py",)
OF_STREAM = ("tests/privacy/test_randomness.py",)
RECOVERY = "tests/statistics/test_seed_recovery.py"

NOISE = (
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
        old="scale = noise_multiplier * max_grad_norm",
        new="scale = 0.5 * noise_multiplier * max_grad_norm",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="noise-for-another-clip-norm",
        fault="The noise is scaled for a clip norm of 1 whatever the clip norm is, as where sensitivity is a setting "
        "of its own (Flower's LocalDpMod).",
        file=STEP,
        old="max_grad_norm=plan.max_grad_norm,",
        new="max_grad_norm=1.0,",
        tests=OF_STEP,
    ),
    Mutant(
        name="noise-once-a-micro-batch",
        fault="Noise is added to each micro-batch instead of once to the logical batch, so its amount depends on how "
        "the batch is cut, and an empty batch gets none.",
        file=STEP,
        old="""        seen += len(batch)
    assert seen == len(sampled), "each sampled record counts exactly once"
    noisy = add_gaussian_noise(
        {name: total.cpu().numpy() for name, total in sums.items()},
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        stream=noise,
    )
""",
        new="""        seen += len(batch)
        part = add_gaussian_noise(
            {name: total.cpu().numpy() for name, total in sums.items()},
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            stream=noise,
        )
        sums = {name: torch.from_numpy(value) for name, value in part.items()}
    noisy = {name: total.numpy() for name, total in sums.items()}
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
        else total + scale * stream.normal(total.size).reshape(total.shape)
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
        lambda same: {name: total + scale * same[: total.size].reshape(total.shape) for name, total in sums.items()}
    )(stream.normal(max(total.size for total in sums.values())))""",
        tests=OF_MECHANISM,
    ),
    Mutant(
        name="noise-rounded-to-integers",
        fault="The noise is rounded to whole numbers, as for integer sums; below half a unit nothing of it is left.",
        file=MECHANISM,
        old=ADDED,
        new="{name: total + np.rint(scale * stream.normal(total.size)).reshape(total.shape) "
        "for name, total in sums.items()}",
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
        name: total + scale * torch.randn(total.shape, generator=generator, dtype=torch.float64).numpy()
        for name, total in sums.items()
    }""",
        tests=(f"{RECOVERY}::test_in_a_real_round_there_is_nothing_to_find",),
    ),
    Mutant(
        name="seed-of-sixteen-bits",
        fault="The operating system's bits are cut to a small seed of numpy's generator, which is no CSPRNG.",
        file=RANDOMNESS,
        old="        pairs = (_DRAWS_PER_NORMAL // 2, count)\n",
        new="        return np.random.default_rng(int(self.uniform64(1)[0]) & 0xFFFF).standard_normal(count)\n"
        "        pairs = (_DRAWS_PER_NORMAL // 2, count)\n",
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
        fault="A noise value is one transformed pair of floats, which leaves holes in its output (Mironov 2012).",
        file=RANDOMNESS,
        old="_DRAWS_PER_NORMAL = 4",
        new="_DRAWS_PER_NORMAL = 2",
        tests=OF_STREAM,
    ),
    Mutant(
        name="a-pair-kept-together",
        fault="Sine and cosine of one pair are added up, so that a value has half as many draws behind it as it seems.",
        file=RANDOMNESS,
        old="np.roll((radius * np.sin(angle)).sum(axis=0), 1)",
        new="(radius * np.sin(angle)).sum(axis=0)",
        tests=("tests/privacy/test_draws.py",),
    ),
    Mutant(
        name="cut-tails",
        fault="Noise is cut at three standard deviations: an output beyond them names its data set.",
        file=RANDOMNESS,
        old="return total / np.sqrt(_DRAWS_PER_NORMAL)",
        new="return np.clip(total / np.sqrt(_DRAWS_PER_NORMAL), -3, 3)",
        tests=OF_STREAM,
    ),
)
