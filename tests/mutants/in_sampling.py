"""Faults of who takes part in a step, and of which records a site trains on."""

from .mutant import Mutant

MECHANISM, STEP = "fedtune/privacy/mechanism.py", "fedtune/training/dp_step.py"
DRAWN = "return np.flatnonzero(stream.bernoulli(num_units, sampling_rate))"
DEALT = ("tests/data/test_partition.py",)

SAMPLING = (
    Mutant(
        name="shuffled-instead-of-poisson",
        fault="Batches of one size are drawn without replacement, and accounted as Poisson samples, as where "
        "make_private's loader is thrown away (FATE-LLM): audits found up to four times the claimed leakage.",
        file=MECHANISM,
        old=DRAWN,
        new="order = np.argsort(stream.uniform64(num_units), kind='stable')\n"
        "    return np.sort(order[: round(num_units * sampling_rate)])",
        tests=("tests/privacy/test_mechanism.py",),
    ),
    Mutant(
        name="another-rate-than-asked-for",
        fault="The rate is made from a batch size and the true number of records, as from the length of a data loader, "
        "so it is not the rate that was accounted.",
        file=STEP,
        old="sampled = poisson_sample(records.count, plan.sampling_rate, sampling)",
        new="asked = min(1.0, plan.sampling_rate * records.declared_size / max(1, records.count))\n"
        "    sampled = poisson_sample(records.count, asked, sampling)",
        tests=("tests/training/test_step_faults.py",),
    ),
    Mutant(
        name="one-sample-for-all-steps",
        fault="All local steps of a round train on one Poisson sample, drawn once, and are accounted as independent.",
        file="fedtune/training/local.py",
        old='    sampling = randomness.stream(*purpose, "sampling")\n',
        new="""    sampling = randomness.stream(*purpose, "sampling")
    drawn_once = sampling.bernoulli(records.count, work.plan.sampling_rate)
    sampling.bernoulli = lambda count, rate: drawn_once
""",
        tests=("tests/training/test_step_faults.py",),
    ),
    Mutant(
        name="a-rate-ten-percent-higher",
        fault="Units join a tenth more often than is accounted.",
        file=MECHANISM,
        old=DRAWN,
        new="return np.flatnonzero(stream.bernoulli(num_units, min(1.0, 1.1 * sampling_rate)))",
        tests=("tests/privacy/test_mechanism.py",),
    ),
    Mutant(
        name="one-draw-for-two-records",
        fault="Neighbouring records share their draw, so that they always join together.",
        file=MECHANISM,
        old=DRAWN,
        new="return np.flatnonzero(np.repeat(stream.bernoulli((num_units + 1) // 2, sampling_rate), 2)[:num_units])",
        tests=("tests/privacy/test_mechanism.py", "tests/statistics/test_sampling.py"),
    ),
    Mutant(
        name="empty-batch-skipped",
        fault="An empty Poisson batch is passed over without noise or step, as in FL4Health: that nothing moved tells "
        "that nobody was drawn.",
        file=STEP,
        old="    sums = zeros(parameters)\n",
        new="    if not len(sampled):\n        return\n    sums = zeros(parameters)\n",
        tests=("tests/training/test_step_faults.py",),
    ),
    Mutant(
        name="split-by-shuffling",
        fault="Training and held-out records are told apart by a seeded shuffle: one record more moves others to the "
        "other side.",
        file="fedtune/data/partition.py",
        old="""    for record in records:
        sides[is_heldout(record, fraction=fraction, key=key, unit=unit)].append(record)
    return sides""",
        new="""    everyone = list(records)
    order = np.random.default_rng(key[0]).permutation(len(everyone))
    held = set(order[: round(fraction * len(everyone))].tolist())
    for place, record in enumerate(everyone):
        sides[place in held].append(record)
    return sides""",
        tests=DEALT,
    ),
    Mutant(
        name="duplicates-removed",
        fault="Repeated records are dropped over the whole file, so that one record takes another's place.",
        file="fedtune/data/partition.py",
        old="    sides: tuple[list[Record], list[Record]] = ([], [])\n    for record in records:",
        new="    sides: tuple[list[Record], list[Record]] = ([], [])\n"
        "    for record in {record_key(record): record for record in records}.values():",
        tests=DEALT,
    ),
    Mutant(
        name="held-out-by-a-public-key",
        fault="A real site's held-out split follows from a seed that the lead knows, so that the lead knows of each "
        "record on which side it fell.",
        file="fedtune/sites/real_site.py",
        old='key = SigningKey.load(files.site_key).secret("held-out split")',
        new="key = str(shared.config.seed).encode().ljust(32)",
        tests=("tests/sites/test_real_site.py::test_each_site_holds_out_records_by_a_key_of_its_own",),
    ),
)
