"""Which places of report.json stand in which column of the page's tables."""

from __future__ import annotations

from fedtune.report.page.wording import Column

NOT_RELEASED = "word.not_released"
SITE = Column(heading="page.site", at="@site", kind="text")
SHORT_SITE = Column(heading="page.site", at="@site", kind="name")
RUN = Column(heading="page.run", at="run", kind="text")
RUN_OF_CHARGE = Column(heading="page.run", at="../../run", kind="text")
STATE = Column(heading="budget.verdict", at="verdict/state", kind="code:state")
DECLARED = Column(heading="budget.declared", at="declared_size", kind="count")


def epsilon(heading: str, at: str) -> Column:
    """A column of epsilons; those of a site's charges are "at most" where it fell silent."""
    kind = "epsilon?" if at.startswith("spent/") else "epsilon"
    return Column(heading=heading, at=at, kind=kind, absent=NOT_RELEASED)


def count(heading: str, at: str) -> Column:
    """A column of whole numbers."""
    return Column(heading=heading, at=at, kind="count")


def score(name: str, *, at: str) -> Column:
    """A column of one score, whose name is its heading."""
    return Column(heading=name, at=at, kind="score", is_named=True)


LIMIT = Column(heading="budget.approved", at="approved/max_epsilon", kind="cap", absent=NOT_RELEASED)
LEFT = Column(heading="budget.left", at="left", kind="left")

BUDGET_OF_RUN = (
    SHORT_SITE,
    STATE,
    epsilon("budget.this_run", "spent/epsilon"),
    epsilon("budget.all_runs", "lifetime/epsilon"),
    LIMIT,
    Column(heading="budget.left", at="lifetime/left", kind="left", absent=NOT_RELEASED),
    Column(heading="budget.reported", at="reported", kind="day", absent="word.dash"),
)
BUDGET_OF_LEDGER = (
    SHORT_SITE,
    STATE,
    DECLARED,
    epsilon("budget.all_runs", "spent/epsilon"),
    epsilon("budget.set_aside", "lifetime/with_set_aside"),
    LIMIT,
    LEFT,
)
VERDICTS = (
    SITE,
    STATE,
    Column(heading="engineer.why", at="verdict/reasons", kind="code:reason"),
    Column(heading="engineer.source", at="source", kind="code:source"),
)
CHARGES = (
    SITE,
    DECLARED,
    Column(heading="engineer.failures", at="meaning/expected_failures", kind="failures"),
    Column(heading="engineer.rounds", at="spent/rounds", kind="count?", absent=NOT_RELEASED),
    Column(heading="engineer.steps", at="spent/steps", kind="count?", absent=NOT_RELEASED),
    epsilon("engineer.pld", "spent/epsilon_pld"),
    epsilon("engineer.rdp", "spent/epsilon_rdp"),
    epsilon("engineer.verdict_figure", "spent/epsilon"),
)
PLANNED = epsilon("engineer.planned", "spent/planned_epsilon")
APPROVED = (
    SITE,
    LIMIT,
    Column(heading="engineer.per_run", at="approved/max_epsilon_per_run", kind="cap", absent=NOT_RELEASED),
    Column(heading="engineer.per_period", at="approved/max_epsilon_per_period", kind="cap", absent=NOT_RELEASED),
    Column(heading="engineer.period", at="approved/period", kind="code:period"),
    Column(heading="engineer.since", at="approved/since", kind="moment"),
)
MECHANISMS = (
    SITE,
    RUN,
    Column(heading="mechanism.assumed", at="sampling_assumed", kind="code:sampling"),
    Column(heading="mechanism.run", at="sampling_run", kind="code:sampling"),
    Column(heading="mechanism.rate", at="sampling_rate", kind="number"),
    Column(heading="mechanism.noise", at="noise_multiplier", kind="number"),
    Column(heading="mechanism.clip", at="max_grad_norm", kind="number", absent="word.none"),
    count("mechanism.local_steps", "local_steps"),
    count("mechanism.rounds", "rounds"),
    Column(heading="mechanism.metrics_noise", at="metrics_noise_multiplier", kind="number", zero="mechanism.no_scores"),
)
MECHANISMS_BY_USER = (*MECHANISMS, count("mechanism.records_per_user", "records_per_user"))
EVENTS = (
    SITE,
    RUN_OF_CHARGE,
    Column(heading="mechanism.event", at="event", kind="json"),
    count("mechanism.count", "count"),
)
CURVE = (
    Column(heading="setting.delta", at="delta", kind="exact"),
    Column(heading="engineer.pld", at="epsilon_pld", kind="epsilon"),
    Column(heading="engineer.rdp", at="epsilon_rdp", kind="epsilon"),
)
RATES = (
    SITE,
    Column(heading="curve.false_alarms", at="false_alarms", kind="percent"),
    Column(heading="curve.ceiling", at="ceiling", kind="percent"),
    Column(heading="curve.mechanism", at="mechanism", kind="percent", absent="word.not_computed"),
)
GUESSES = (
    SITE,
    Column(heading="curve.ceiling", at="meaning/right_of_100_ceiling", kind="of_100_fine"),
    Column(
        heading="curve.mechanism", at="meaning/right_of_100_mechanism", kind="of_100_fine", absent="word.not_computed"
    ),
)
POSTERIOR = (
    Column(heading="meaning.before", at="prior", kind="percent"),
    Column(heading="meaning.after", at="ceiling", kind="percent"),
)
VERIFICATION = (
    SITE,
    count("ledger.events", "verification/num_events"),
    Column(heading="ledger.head", at="verification/head", kind="hash", absent="ledger.not_verified"),
    Column(heading="ledger.public_key", at="verification/site_key", kind="hash", absent="ledger.not_verified"),
    Column(heading="ledger.key_expected", at="verification/key_expected", kind="yes_no"),
    Column(heading="ledger.rollback", at="verification/rollback_excluded", kind="yes_no"),
    Column(heading="ledger.anchor", at="verification/anchor_sequence", kind="count", absent="ledger.no_anchor"),
)
LIFETIME = (
    SITE,
    Column(heading="ledger.order", at="lifetime/order", kind="number"),
    epsilon("ledger.filter", "lifetime/epsilon"),
    epsilon("ledger.set_aside", "lifetime/with_set_aside"),
    epsilon("engineer.pld", "lifetime/epsilon_pld"),
    epsilon("engineer.rdp", "lifetime/epsilon_rdp"),
    Column(heading="engineer.period", at="lifetime/period", kind="code:period"),
    epsilon("ledger.period_spent", "lifetime/period_epsilon"),
    Column(heading="budget.left", at="lifetime/left", kind="left"),
    count("ledger.runs_left", "lifetime/reference_runs_left"),
)
LEDGER_STATE = (
    SITE,
    Column(heading="ledger.frozen", at="lifetime/frozen", kind="yes_no"),
    Column(heading="ledger.in_doubt", at="lifetime/in_doubt", kind="yes_no"),
    count("ledger.restored", "lifetime/restored"),
    Column(heading="ledger.seeded", at="lifetime/seeded", kind="yes_no"),
    Column(heading="ledger.reported", at="reported", kind="day", absent="word.dash"),
)
RUNS = (
    SITE,
    Column(heading="page.run", at="run", kind="text"),
    Column(heading="page.lead", at="lead", kind="key"),
    Column(heading="ledger.dataset", at="dataset", kind="text"),
    Column(heading="ledger.run_state", at="state", kind="code:run_state"),
    count("mechanism.rounds", "rounds"),
    count("ledger.of_rounds", "most_rounds"),
    count("engineer.steps", "steps"),
    epsilon("ledger.run_epsilon", "epsilon"),
    epsilon("engineer.planned", "planned_epsilon"),
    Column(heading="setting.seeded", at="seeded_noise", kind="yes_no"),
)
CAPS = (
    SITE,
    Column(heading="ledger.from", at="time", kind="moment"),
    Column(heading="ledger.cap", at="max_epsilon", kind="cap"),
)
RELEASES = (
    SITE,
    RUN,
    Column(heading="release.kind", at="kind", kind="code:release"),
    Column(heading="release.reason", at="reason", kind="code:refusal", absent="word.dash"),
    count("release.count", "count"),
    Column(heading="release.first", at="first", kind="moment", absent="word.dash"),
    Column(heading="release.last", at="last", kind="moment", absent="word.dash"),
)
ROUND = count("page.round", "round")
COST = (
    ROUND,
    Column(heading="cost.seconds", at="seconds", kind="seconds"),
    Column(heading="cost.down", at="bytes_down", kind="bytes"),
    Column(heading="cost.up", at="bytes_up", kind="bytes"),
    Column(heading="cost.sites", at="sites", kind="length"),
    Column(heading="cost.failed", at="failed_sites", kind="failures_by_site"),
)
EPSILON_SO_FAR = epsilon("utility.epsilon", "epsilon")
BUDGET_LEFT = (
    SITE,
    epsilon("budget.all_runs", "lifetime/epsilon"),
    epsilon("budget.set_aside", "lifetime/with_set_aside"),
    LIMIT,
    LEFT,
)
STEPS = (
    SITE,
    RUN,
    Column(heading="ledger.from", at="time", kind="moment", absent="word.dash"),
    Column(heading="utility.epsilon", at="epsilon", kind="epsilon"),
)
ASSUMPTIONS = (
    Column(heading="assumptions.assumption", at="code", kind="code:assumption"),
    Column(heading="assumptions.status", at="status", kind="code:status"),
    Column(heading="assumptions.evidence", at="evidence", kind="text"),
)
AUDIT_SITE = Column(heading="page.site", at="site", kind="text", absent="audit.all_sites")
AUDIT = (
    AUDIT_SITE,
    Column(heading="audit.claimed", at="claimed_epsilon", kind="epsilon"),
    Column(heading="audit.shown", at="lower_bound", kind="left"),
    Column(heading="audit.best_possible", at="best_possible", kind="left"),
    count("audit.canaries", "canaries"),
    count("audit.guesses", "guesses"),
    count("audit.right", "right"),
)
MEMBERSHIP = (
    AUDIT_SITE,
    Column(heading="audit.guessed_by", at="score", kind="code:audit_score"),
    Column(heading="audit.auroc", at="auroc", kind="score"),
    Column(heading="audit.low", at="auroc_low", kind="score"),
    Column(heading="audit.high", at="auroc_high", kind="score"),
    Column(heading="audit.found_1", at="hit_rates/0/found", kind="percent", absent="audit.too_few"),
    Column(heading="audit.high", at="hit_rates/0/high", kind="percent", absent="audit.too_few"),
    Column(heading="audit.found_01", at="hit_rates/1/found", kind="percent", absent="audit.too_few"),
    Column(heading="audit.high", at="hit_rates/1/high", kind="percent", absent="audit.too_few"),
    count("audit.trained_on", "trained_on"),
    count("audit.never_used", "never_used"),
)
