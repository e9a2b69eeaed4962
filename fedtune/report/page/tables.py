"""The page's tables: which rows of report.json each one has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from fedtune.report.page import columns as of
from fedtune.report.page.drawing import MOST_LINES
from fedtune.report.page.wording import MOST_ROWS, Column, Table, Words, pointer, shortened

PAGE_ONE_SITES = 4
"""Sites on page 1, the least favourable first; later tables list each."""
_LONGEST_HEADING = 20


class Tables:
    """Every table of the page, made when the template asks for it."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._is_ledger = words.report.kind == "ledger"
        self._sites = [f"/sites/{place}" for place in words.order]

    def _table(self, caption: str, columns: Sequence[Column], rows: Sequence[str], **values: object) -> Table:
        # A ledger's rows are one site's history, whose end matters most; a run's begin with the least favourable site.
        same = (of.SITE,) if self._is_ledger else (of.RUN, of.RUN_OF_CHARGE)
        columns = [column for column in columns if column not in same]
        return self._words.table(self._words.text(caption, **values), columns, rows, last=self._is_ledger)

    def _of_sites(self, caption: str, columns: Sequence[Column], *, having: str = "site", **values: object) -> Table:
        rows = [site for site in self._sites if self._words.at(f"{site}/{having}") is not None]
        return self._words.table(self._words.text(caption, **values), columns, rows, last=False)

    def _of_list(self, caption: str, columns: Sequence[Column], name: str) -> Table:
        return self._table(caption, columns, self._words.rows(name))

    def _of_worst(self, caption: str, columns: Sequence[Column], name: str) -> Table:
        worst = self._words.worst
        rows = [] if worst is None else self._words.rows(name, sites=[int(worst.rsplit("/", 1)[1])])
        return self._words.table(self._words.text(caption), columns, rows, last=False)

    def budget(self) -> Table:
        """Page 1's table of sites."""
        columns = of.BUDGET_OF_LEDGER if self._is_ledger else of.BUDGET_OF_RUN
        first = self._sites[:PAGE_ONE_SITES]
        table = self._words.table(self._words.text("budget.heading"), columns, first, last=False)
        return replace(table, all=len(self._sites))

    def verdicts(self) -> Table:
        """Each site's result, and why."""
        return self._of_sites("engineer.verdicts_caption", of.VERDICTS)

    def charges(self) -> Table:
        """Each site's charges by both accountants."""
        columns = of.CHARGES if self._is_ledger else (*of.CHARGES, of.PLANNED)
        return self._of_sites("engineer.sites_caption", columns, delta=self._words.figure("/delta", "exact"))

    def approved(self) -> Table:
        """Each site's own limits."""
        return self._of_sites("engineer.approved_caption", of.APPROVED, having="approved")

    def mechanisms(self) -> Table:
        """What each run did at each site."""
        columns = of.MECHANISMS_BY_USER if self._words.report.unit == "user" else of.MECHANISMS
        return self._of_list("mechanism.caption", columns, "mechanisms")

    def events(self) -> Table:
        """From which epsilon is computed."""
        rows = [
            f"{mechanism}/charges/{n}"
            for mechanism in self._words.rows("mechanisms")
            for n in range(len(self._words.at(f"{mechanism}/charges")))
        ]
        return self._table("mechanism.events_caption", of.EVENTS, rows)

    def curve(self) -> Table:
        """Epsilon at other deltas, at the site that spent most."""
        return self._of_worst("curve.caption", of.CURVE, "curve")

    def posterior(self) -> Table:
        """How sure an attacker can become."""
        return self._of_worst("meaning.posterior", of.POSTERIOR, "meaning/posterior")

    def rates(self) -> Table:
        """What an attack finds at few false alarms."""
        return self._of_list("curve.rates_caption", of.RATES, "meaning/hit_rates")

    def guesses(self) -> Table:
        """Right guesses of 100 at each site."""
        return self._of_sites("curve.guesses_caption", of.GUESSES, having="meaning")

    def verification(self) -> Table:
        """What checking each ledger found."""
        return self._of_sites("ledger.verification_caption", of.VERIFICATION, having="verification")

    def lifetime(self) -> Table:
        """Figures over all runs."""
        return self._of_sites("ledger.lifetime_caption", of.LIFETIME, having="lifetime")

    def ledger_state(self) -> Table:
        """What has happened to each ledger."""
        return self._of_sites("ledger.state_caption", of.LEDGER_STATE, having="lifetime")

    def runs(self) -> Table:
        """Runs of each ledger."""
        return self._of_list("ledger.runs_caption", of.RUNS, "lifetime/runs")

    def caps(self) -> Table:
        """How lifetime limits changed."""
        return self._of_list("ledger.caps_caption", of.CAPS, "lifetime/caps")

    def releases(self) -> Table:
        """What left, and what was refused."""
        return self._of_list("release.caption", of.RELEASES, "releases")

    def assumptions(self) -> Table:
        """With the evidence for each."""
        rows = [f"/assumptions/{n}" for n in range(len(self._words.report.assumptions))]
        return self._words.table(self._words.text("assumptions.heading"), of.ASSUMPTIONS, rows, last=False)

    def audit(self) -> Table:
        """Lower bounds beside claims."""
        return self._of_audit("audit.caption", of.AUDIT, "bounds")

    def membership(self) -> Table:
        """How well real records that were trained on are told from others."""
        return self._of_audit("audit.membership_caption", of.MEMBERSHIP, "membership")

    def _of_audit(self, caption: str, columns: Sequence[Column], name: str) -> Table:
        rows = [f"/audit/{name}/{n}" for n in range(len(self._words.at(f"/audit/{name}") or ()))]
        return self._words.table(self._words.text(caption), columns, rows, last=False)

    def steps(self) -> Table:
        """Epsilon after each run of a ledger; of a run, after each round at the sites that are drawn."""
        if self._is_ledger:
            return self._of_list("chart.epsilon_spent", of.STEPS, "steps")
        sites = [site for site in self._sites if self._words.at(f"{site}/steps")][:MOST_LINES]
        steps = {site: {step["round"]: n for n, step in enumerate(self._words.at(f"{site}/steps"))} for site in sites}
        rounds = sorted({number for known in steps.values() for number in known if number is not None})
        shown = rounds[-MOST_ROWS:]
        return Table(
            caption=self._words.text("chart.epsilon_spent"),
            columns=((self._words.text("page.round"), False), *((self._name(site), True) for site in sites)),
            rows=tuple((self._round(steps, number), *self._epsilons(steps, number)) for number in shown),
            all=len(rounds),
        )

    def _name(self, site: str) -> Markup:
        return Markup("{}").format(shortened(self._words.at(f"{site}/site"), _LONGEST_HEADING))

    def _round(self, steps: Mapping[str, Mapping[int, int]], number: int) -> Markup:
        site = next(site for site, known in steps.items() if number in known)
        return self._words.figure(f"{site}/steps/{steps[site][number]}/round", "count")

    def _epsilons(self, steps: Mapping[str, Mapping[int, int]], number: int) -> Iterator[Markup]:
        for site, known in steps.items():
            at = f"{site}/steps/{known[number]}/epsilon" if number in known else None
            yield self._words.text("word.dash") if at is None else self._words.figure(at, "epsilon")

    def budget_left(self) -> Table:
        """Spent, held, limit and what is left."""
        return self._of_sites("chart.budget_left", of.BUDGET_LEFT, having="approved")

    def cost(self) -> Table:
        """Time and traffic."""
        return self._words.table(self._words.text("cost.caption"), of.COST, self.rounds())

    def utility(self) -> Table:
        """Scores by round, beside what was spent by then."""
        scores = (of.score(name, at=pointer("scores", name)[1:]) for name in self.score_names())
        columns = (of.ROUND, *scores, of.EPSILON_SO_FAR)
        return self._words.table(self._words.text("utility.caption"), columns, self.rounds())

    def rounds(self) -> list[str]:
        """Pointers to the rounds of a run's report."""
        utility = self._words.report.utility
        return [] if utility is None else [f"/utility/rounds/{n}" for n in range(len(utility.rounds))]

    def score_names(self) -> list[str]:
        """Scores that every round has."""
        utility = self._words.report.utility
        if utility is None:
            return []
        named = {name: None for one in utility.rounds for name in one.scores}  # in their order
        return [name for name in named if all(name in one.scores for one in utility.rounds)]

    def scores(self) -> Table:
        """Before and after training, and without privacy where that is known."""
        utility = self._words.json["utility"] or {}
        kinds = [kind for kind in ("before", "final", "non_private") if utility.get(kind) is not None]
        names = list({name: None for kind in kinds for name in utility[kind]})
        return Table(
            caption=self._words.text("utility.scores_caption"),
            columns=(
                (self._words.text("utility.score"), False),
                *((self._words.text(f"utility.{kind}"), True) for kind in kinds),
            ),
            rows=tuple(
                (Markup("{}").format(name), *(self._score(kind, name, utility[kind]) for kind in kinds))
                for name in names
            ),
            all=len(names),
        )

    def _score(self, kind: str, name: str, known: Mapping[str, object]) -> Markup:
        if name not in known:
            return self._words.text("word.unknown")
        return self._words.figure(pointer("utility", kind, name), "score")
