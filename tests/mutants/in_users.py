"""Faults of privacy for users: everything of one person counts once, or it is not the guarantee that is stated."""

from .mutant import Mutant

USERS = "fedtune/training/users.py"
PARTITION = "fedtune/data/partition.py"
OF_USERS = ("tests/training/test_step_faults.py",)
DEALT = ("tests/data/test_users.py",)

USER_FAULTS = (
    Mutant(
        name="clipped-by-record-not-by-user",
        fault="With users as units each record is clipped, and a user adds as many clip norms as it has records.",
        file=USERS,
        old="""                if name not in means:
                    means[name] = gradient.new_zeros((len(batch), *gradient.shape[1:]), dtype=torch.float64)
                for user, share, row in zip(users.tolist(), shares.tolist(), gradient, strict=False):
                    means[name][user].add_(row, alpha=share)
""",
        new="""                rows = gradient[: len(users)].double()
                means[name] = torch.cat([means[name], rows]) if name in means else rows
""",
        tests=OF_USERS,
    ),
    Mutant(
        name="cap-on-records-ignored",
        fault="All records of a sampled user take part, whatever the most that the plan and the site's policy allow.",
        file="fedtune/privacy/mechanism.py",
        old="    if num_records <= most:\n",
        new="    if num_records <= most or most > 0:\n",
        tests=OF_USERS,
    ),
    Mutant(
        name="added-up-in-the-batch-s-order",
        fault="A user's records are added up in the order of the micro-batches that are fullest, which follows from "
        "who else was drawn: where they cancel, another bit of rounding is left of them, and one user moves another's.",
        file=USERS,
        old="        for part in self.examples.parts(records):\n",
        new="        for part in sorted(self.examples.parts(records), key=lambda part: -len(part.places)):\n",
        tests=OF_USERS,
    ),
    Mutant(
        name="every-record-its-own-user",
        fault="Users are told apart by record: the run is accounted and reported for users, and protects records.",
        file=PARTITION,
        old='        places.setdefault(record.fields["user"], []).append(place)',
        new="        places.setdefault(f\"{record.fields['user']} {place}\", []).append(place)",
        tests=DEALT,
    ),
    Mutant(
        name="user-on-both-sides",
        fault="With users as units each record is held out, and dealt to a site, by its own hash, so that one user's "
        "records lie on both sides and at several sites.",
        file=PARTITION,
        old='    whole = record if unit == "record" else Record({"user": record.fields["user"]})',
        new="    whole = record",
        tests=DEALT,
    ),
    Mutant(
        name="user-at-two-sites",
        fault="A column may give one user's records to two sites: each promises for its part, and the person loses the "
        "sum.",
        file=PARTITION,
        old='        if unit == "user" and site_of.setdefault(record.fields["user"], site) != site:',
        new='        if unit == "user" and site_of.setdefault(record.fields["user"], site) < 0:',
        tests=DEALT,
    ),
    Mutant(
        name="scores-by-record",
        fault="With users as units the held-out scores are summed by record, and noised as if a user had one.",
        file="fedtune/sites/work.py",
        old="            exact if users is None else user_scores(exact, users),",
        new="            exact,",
        tests=("tests/sites/test_by_user.py::test_a_user_adds_one_score_to_the_sum_however_many_records_it_has",),
    ),
    Mutant(
        name="another-unit-than-the-population-s",
        fault="A run for records is accepted at a site whose population is protected by user.",
        file="fedtune/privacy/site_policy.py",
        old="        (Reason.UNIT, plan.unit, [policy.population.unit]),",
        new="        (Reason.UNIT, plan.unit, [plan.unit]),",
        tests=("tests/privacy/test_site_policy.py",),
    ),
    Mutant(
        name="who-a-user-is-by-id-alone",
        fault="Only the id of a data set is held to its user column: under another id the same file's persons become "
        "visits, and are charged as such.",
        file="fedtune/privacy/ledger/history.py",
        old="            if dataset.path:\n",
        new="            if dataset.path and False:\n",
        tests=("tests/privacy/test_ledger.py::test_a_column_says_who_a_user_is_after_a_detour_and_under_another_id",),
    ),
)
