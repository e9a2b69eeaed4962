"""Faults of the noise that sites make together, and of what is claimed for it."""

from .mutant import Mutant

NOISE = "fedtune/privacy/distributed_noise.py"
OF_SHARES = ("tests/privacy/test_distributed_noise.py",)
OF_EPSILON = ("tests/privacy/test_distributed_epsilon.py",)
SHARE = """    share = math.ceil(total / math.sqrt(honest) * 1e4) / 1e4
    while together(share, honest) < total:
"""
CUT_OFF = """    bounded = {name: np.clip(total, -most, most) for name, total in sums.items()}
    noisy = add_gaussian_noise(bounded, noise_multiplier=shared.noise_multiplier, stream=stream)
    return {name: (total + (1 << coarser >> 1)) >> coarser for name, total in noisy.items()}
"""

DISTRIBUTED_NOISE = (
    Mutant(
        name="noise-of-all-sites-counted",
        fault="A sum is charged as if all sites of the run were in it, though some dropped out.",
        file=NOISE,
        old="return max(1, survivors - colluders)",
        new="return max(1, self.num_sites - colluders)",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="a-plan-of-two-sums",
        fault="A plan may have a threshold at which a server can have two sets of survivors confirmed: the sums differ "
        "by one site's vector, and each site is charged for one.",
        file=NOISE,
        old="        if not least <= self.threshold <= self.num_sites:",
        new="        if not self.colluders < self.threshold <= self.num_sites:",
        tests=OF_SHARES,
    ),
    Mutant(
        name="noise-of-colluders-counted",
        fault="Noise that colluding sites know counts as if it hid something.",
        file=NOISE,
        old="return max(1, survivors - colluders)",
        new="return max(1, survivors)",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="share-for-the-threshold-without-colluders",
        fault="A site's share of the noise is calibrated to all sites of the smallest sum, colluders among them.",
        file=NOISE,
        old="    honest = threshold - colluders\n",
        new="    honest = threshold\n",
        tests=OF_SHARES,
    ),
    Mutant(
        name="share-of-the-deviation",
        fault="The standard deviation is divided among the sites, as if deviations added up and not variances.",
        file=NOISE,
        old=SHARE,
        new="    share = math.ceil(total / honest * 1e4) / 1e4\n    while False:\n",
        tests=OF_SHARES,
    ),
    Mutant(
        name="deviations-added-up",
        fault="Shares of noise are accounted as if their standard deviations added up.",
        file=NOISE,
        old="    total = noise_multiplier * math.sqrt(shares)\n    while Fraction(total)",
        new="    total = noise_multiplier * shares\n    while False and Fraction(total)",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="share-rounded-to-the-nearest",
        fault="A share is rounded to four digits, down as well as up, and the target is overshot.",
        file=NOISE,
        old=SHARE,
        new="    share = round(total / math.sqrt(honest), 4)\n    while False:\n",
        tests=OF_SHARES,
    ),
    Mutant(
        name="credit-for-local-steps",
        fault="Several local steps before one sum get the credit of all sites' noise, though what a site's second "
        "step adds may show the hidden state that its own share alone hides.",
        file=NOISE,
        old="    if local_steps > 1:\n        honest = 1\n",
        new="",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="local-steps-counted-once",
        fault="Several local steps before one sum are charged as one release.",
        file=NOISE,
        old="together(noise_multiplier, honest), steps=local_steps\n",
        new="together(noise_multiplier, honest), steps=1\n",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="cells-wider-than-the-noise",
        fault="Values are sent in any cells, also such that each site's rounding takes its noise away (continuous "
        "noise that each site rounds by itself).",
        file=NOISE,
        old="        if _cells(self.noise_multiplier, self.cell_bits) < LEAST_CELLS:\n",
        new="        if _cells(self.noise_multiplier, self.cell_bits) < 0:\n",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="rounded-before-the-noise",
        fault="Sums are rounded to the cells that are sent before they get noise, which moves neighbouring sums "
        "apart by a cell in each coordinate, while the noise is that of one clip norm.",
        file=NOISE,
        old=CUT_OFF,
        new="""    bounded = {name: np.clip(total, -most, most) for name, total in sums.items()}
    coarse = {name: (total + (1 << coarser >> 1)) >> coarser << coarser for name, total in bounded.items()}
    noisy = add_gaussian_noise(coarse, noise_multiplier=shared.noise_multiplier, stream=stream)
    return {name: (total + (1 << coarser >> 1)) >> coarser for name, total in noisy.items()}
""",
        tests=OF_SHARES,
    ),
    Mutant(
        name="cut-off-after-the-noise",
        fault="Values are cut off after the noise, at each site by itself: a sum of cut values is no function of "
        "the sum.",
        file=NOISE,
        old=CUT_OFF,
        new="""    noisy = add_gaussian_noise(sums, noise_multiplier=shared.noise_multiplier, stream=stream)
    bounded = {name: np.clip(total, -most, most) for name, total in noisy.items()}
    return {name: (total + (1 << coarser >> 1)) >> coarser for name, total in bounded.items()}
""",
        tests=OF_SHARES,
    ),
    Mutant(
        name="noise-of-a-coarser-cell",
        fault="The noise is added after the sum was brought into wider cells, with the deviation of the finer "
        "ones as its unit: too little by the ratio of both.",
        file=NOISE,
        old=CUT_OFF,
        new="""    bounded = {name: np.clip(total, -most, most) >> coarser << coarser for name, total in sums.items()}
    share = shared.noise_multiplier / (1 << coarser)
    noisy = add_gaussian_noise(bounded, noise_multiplier=share, stream=stream)
    return {name: (total + (1 << coarser >> 1)) >> coarser for name, total in noisy.items()}
""",
        tests=OF_SHARES,
    ),
    Mutant(
        name="all-others-at-the-threshold",
        fault="The figure for all others colluding leaves out those above the threshold.",
        file=NOISE,
        old="epsilon(shared.num_sites - 1)",
        new="epsilon(shared.threshold - 1)",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="colluders-of-the-lead",
        fault="A site's own figure is for the number of colluders that the lead planned with, whatever the site "
        "withstands.",
        file=NOISE,
        old="assumed = shared.colluders if colluders is None else colluders",
        new="assumed = shared.colluders",
        tests=OF_EPSILON,
    ),
    Mutant(
        name="own-releases-not-counted",
        fault="Scores that a site releases by itself are left out of the three figures.",
        file=NOISE,
        old="accountant.epsilon_pld([*sums, *also], delta",
        new="accountant.epsilon_pld([*sums], delta",
        tests=OF_EPSILON,
    ),
)
