"""Faults of the ledger: what it charges, when, and what it lets through."""

from .mutant import Mutant

LEDGER, HISTORY, RUN = (
    "fedtune/privacy/ledger/site_ledger.py",
    "fedtune/privacy/ledger/history.py",
    "fedtune/privacy/ledger/history.py",
)
FILE, STORE, SPENDING = (
    "fedtune/privacy/ledger/store.py", "fedtune/privacy/ledger/store.py", "fedtune/privacy/ledger/spending.py"
)  # fmt: skip
OF_LEDGER = "tests/privacy/test_ledger.py"
OF_DOUBTS = "tests/privacy/test_doubts.py"
OF_SITE = ("tests/federation/test_site_round.py",)

LEDGER_FAULTS = (
    Mutant(
        name="denied-and-started",
        fault="A run that a person denied starts once somebody else approves it, or the policy asks nobody.",
        file=LEDGER,
        old="        if proposal.digest() in self.history.denied:",
        new="        if False:",
        tests=("tests/federation/test_waiting.py::test_a_denied_run_is_refused_at_once_and_its_reason_stays_here",),
    ),
    Mutant(
        name="charged-after-training",
        fault="A round is charged when it has been trained: a crash or a lost reply costs nothing on paper.",
        file="fedtune/federation/site_round.py",
        old="""\
    granted = site.ledger.reserve(request.proposal, round=request.round, request=request.digest(), unless=make_ready)
    if isinstance(granted, bytes):
        return Update.from_bytes(granted)
    with _held_to_a_schedule(site.ledger.policy.releases.reply_after_s):
        trained = run.train(request, adapter, granted.attempt)
""",
        new="""    trained = run.train(request, adapter, 1)
    granted = site.ledger.reserve(request.proposal, round=request.round, request=request.digest(), unless=make_ready)
    if isinstance(granted, bytes):
        return Update.from_bytes(granted)
    with _held_to_a_schedule(0.0):
"""  # the rest of the block follows
        """        assert trained is not None
""",
        tests=OF_SITE,
    ),
    Mutant(
        name="sent-before-it-is-stored",
        fault="A reply leaves before it is stored, so that after a crash the same request trains, and releases, again.",
        file="fedtune/federation/site_round.py",
        old="    site.ledger.commit(granted, update.to_bytes(), fingerprint=trained.fingerprint)\n",
        new="",
        tests=OF_SITE,
    ),
    Mutant(
        name="reservation-not-counted",
        fault="Only rounds with a stored reply count; one that was reserved and trained, and then lost, is free.",
        file=HISTORY,
        old="return self.attempts.total()",
        new="return len(self.replies)",
        tests=OF_SITE,
    ),
    Mutant(
        name="retry-free",
        fault="A round's second attempt, with fresh noise on the same records, is not charged.",
        file=HISTORY,
        old="for part, count in dp_events.grouped([charged]).items():",
        new="for part, count in dp_events.grouped([charged]).items() if event.attempt == 1 else ():",
        tests=(f"{OF_LEDGER}::test_all_charges_of_a_run_stay_within_its_plan",),
    ),
    Mutant(
        name="retry-beside-the-plan",
        fault="A retry is charged, but does not use up one of the rounds that the plan may take.",
        file=HISTORY,
        old="return self.attempts.total()",
        new="return len(self.attempts)",
        tests=(f"{OF_LEDGER}::test_an_interrupted_round_is_charged_and_its_retry_uses_up_a_later_one",),
    ),
    Mutant(
        name="check-and-reserve-in-two-transactions",
        fault="Budget is checked in one transaction and charged in the next: what another process charges in between "
        "goes unseen.",
        file=LEDGER,
        old="            attempt = run.attempts[round] + 1\n",
        new="        with self._store.transaction():\n"
        "            run = self.history.runs[proposal.run]\n"
        "            attempt = run.attempts[round] + 1\n",
        tests=("tests/privacy/test_one_transaction.py",),
    ),
    Mutant(
        name="a-transaction-that-locks-late",
        fault="A transaction takes its lock with its first write, so that two processes both read that there is room.",
        file=STORE,
        old='file.execute("BEGIN IMMEDIATE")',
        new='file.execute("BEGIN")',
        tests=("tests/privacy/test_ledger_file.py::test_a_transaction_shuts_others_out_before_it_reads",),
    ),
    Mutant(
        name="not-durable",
        fault="A charge is not forced to disk before training begins, and a power cut forgets it.",
        file=STORE,
        old='file.execute("PRAGMA synchronous = EXTRA")',
        new='file.execute("PRAGMA synchronous = OFF")',
        tests=("tests/privacy/test_ledger_file.py::test_a_rollback_journal_and_every_sync_there_is_are_really_set",),
    ),
    Mutant(
        name="policy-not-checked-on-retry",
        fault="A policy that became stricter is not asked for the later rounds and retries of a run under way.",
        file=LEDGER,
        old="        self.policy.check(run.proposal)\n",
        new="",
        tests=(f"{OF_LEDGER}::test_a_stricter_policy_stops_a_running_run",),
    ),
    Mutant(
        name="one-round-too-many",
        fault="A plan of n rounds grants n + 1.",
        file=LEDGER,
        old="if run.charged_rounds >= run.plan.most_rounds:",
        new="if run.charged_rounds > run.plan.most_rounds:",
        tests=OF_SITE,
    ),
    Mutant(
        name="open-runs-not-held",
        fault="A new run is measured against what was charged, without what open runs may still spend.",
        file=SPENDING,
        old="asked=events.grouped([plan.whole]), held=history.set_aside(now), now=now)",
        new="asked=events.grouped([plan.whole]), held=Counter(), now=now)",
        tests=(f"{OF_LEDGER}::test_a_whole_plan_is_set_aside_when_its_first_round_is_accepted",),
    ),
    Mutant(
        name="first-round-alone-held",
        fault="A new run is let in if its first round fits the budget.",
        file=SPENDING,
        old="asked=events.grouped([plan.whole]), held=history.set_aside(now), now=now)",
        new="asked=events.grouped([plan.event()]), held=history.set_aside(now), now=now)",
        tests=(f"{OF_LEDGER}::test_nothing_but_the_population_has_a_budget",),
    ),
    Mutant(
        name="spare-rounds-not-held",
        fault="What is set aside for an open run leaves out its spare rounds, and other runs are let in on them.",
        file=HISTORY,
        old="left = self.plan.most_rounds - self.charged_rounds",
        new="left = max(0, self.plan.num_rounds - self.charged_rounds)",
        tests=(f"{OF_LEDGER}::test_spare_rounds_are_set_aside_with_the_others",),
    ),
    Mutant(
        name="let-in-without-its-spare-rounds",
        fault="A new run is let in if its planned rounds fit the budget, without the spare ones.",
        file=SPENDING,
        old="asked=events.grouped([plan.whole])",
        new="asked=events.grouped([plan.event(rounds=plan.num_rounds)])",
        tests=(f"{OF_LEDGER}::test_a_run_is_let_in_only_with_room_for_its_spare_rounds",),
    ),
    Mutant(
        name="a-clock-set-forward",
        fault="The machine's clock alone opens a period of the budget: set forward, it makes a fresh one.",
        file=HISTORY,
        old="        told = server or clock\n",
        new="        told = clock\n",
        tests=("tests/privacy/test_clock.py::test_a_period_begins_by_both_clocks_and_no_further_than_the_next",),
    ),
    Mutant(
        name="a-period-without-a-person",
        fault="The clock here and the server's together open any period, however far from the newest event.",
        file=HISTORY,
        old="if wanted == begun or wanted == said == begun + 1:",
        new="if wanted == begun or wanted == said:",
        tests=("tests/privacy/test_clock.py::test_a_period_begins_by_both_clocks_and_no_further_than_the_next",),
    ),
    Mutant(
        name="a-past-period-by-the-server",
        fault="A server that tells past months one after the other opens each of them, under a right clock.",
        file=HISTORY,
        old="return max(last, min(clock, told)) if said == begun else last",
        new="return max(last, min(clock, told)) if said <= begun + 1 else last",
        tests=(
            "tests/privacy/test_clock.py::test_a_server_that_tells_one_past_month_after_the_other_opens_none_of_them",
        ),
    ),
    Mutant(
        name="a-clock-set-back",
        fault="The machine's clock is believed: set back, it opens a period whose budget was spent.",
        file=HISTORY,
        old="return now if self.last_time is None else max(now, self.last_time)",
        new="return now",
        tests=(f"{OF_LEDGER}::test_a_clock_set_back_opens_no_new_period",),
    ),
    Mutant(
        name="a-seed-forgotten",
        fault="A later run without a seed clears the mark of an earlier one whose noise anybody can subtract.",
        file=HISTORY,
        old="                self.seeded |= proposal.seeded_noise",
        new="                self.seeded = proposal.seeded_noise",
        tests=(f"{OF_LEDGER}::test_a_seeded_run_marks_the_ledger_for_ever",),
    ),
    Mutant(
        name="frozen-but-sending",
        fault="A population that was frozen while a round was trained still sends its update.",
        file=LEDGER,
        old="            if self.history.frozen:\n                raise Refused(Reason.FROZEN)\n            run =",
        new="            run =",
        tests=(f"{OF_LEDGER}::test_a_frozen_population_takes_part_in_nothing",),
    ),
    Mutant(
        name="chain-not-verified",
        fault="Hashes of events are read and not computed again: whoever can write the file can rewrite the past.",
        file="fedtune/privacy/ledger/chain.py",
        old="        if event.hash != expected:",
        new="        if not event.hash:",
        tests=("tests/privacy/test_chain.py",),
    ),
    Mutant(
        name="last-signature-alone",
        fault="Only the newest event's signature is verified, so that others may carry anybody's.",
        file="fedtune/privacy/ledger/verify.py",
        old="    for event in events:\n        chain.check_signature(event, own_key)",
        new="    for event in events[-1:]:\n        chain.check_signature(event, own_key)",
        tests=("tests/privacy/test_verify.py",),
    ),
    Mutant(
        name="anchor-by-length",
        fault="A ledger that is as long as its anchor passes, although it is another branch.",
        file=STORE,
        old="        if not self.history.holds(anchor):",
        new="        if self.history.length < anchor.sequence:",
        tests=("tests/privacy/test_rollback.py",),
    ),
    Mutant(
        name="put-back-and-trained-on",
        fault="A ledger that lacks a receipt which the site itself gave goes on training.",
        file=LEDGER,
        old="        if not known:\n            raise Refused(Reason.LEDGER_BEHIND_RECEIPT,",
        new="        if known and self.history.in_doubt:\n            raise Refused(Reason.LEDGER_BEHIND_RECEIPT,",
        tests=("tests/federation/test_hostile_lead.py",),
    ),
    Mutant(
        name="doubt-lost-with-its-ledger",
        fault="A restore forgets that the ledger which it replaces was in doubt: the site trains on one that was never "
        "charged for what a receipt showed.",
        file=LEDGER,
        old="doubts = self.history.doubts.union(anchor.doubts)",
        new="doubts = self.history.doubts",
        tests=(
            f"{OF_DOUBTS}::test_a_ledger_that_is_put_back_takes_over_the_doubt_of_the_one_it_replaces",
            "tests/deploy/test_backup.py::test_a_doubt_outlasts_the_ledger_that_noted_it",
        ),
    ),
    Mutant(
        name="first-doubt-alone",
        fault="Of several receipts that a ledger lacks the first is noted: an anchor that knows it clears the others.",
        file=LEDGER,
        old="            if not known and shown not in doubts and len(doubts) < _MOST_DOUBTS:",
        new="            if not known and not doubts:",
        tests=(f"{OF_DOUBTS}::test_of_several_doubts_an_anchor_clears_those_that_it_knows",),
    ),
    Mutant(
        name="doubts-beyond-the-noted",
        fault="Receipts beyond the number that is noted are forgotten once an anchor knows the others.",
        file=LEDGER,
        old="            if len(doubts) < _MOST_DOUBTS:\n                doubts",
        new="            if True:\n                doubts",
        tests=(f"{OF_DOUBTS}::test_no_doubt_is_cleared_where_there_may_be_more_than_were_noted",),
    ),
    Mutant(
        name="mute-anchor-believed",
        fault="Far from its end an anchor's branch passes for any other: a receipt of rounds that were not made up "
        "for is known.",
        file="fedtune/privacy/ledger/restored.py",
        old="(mute and shown.rounds <= shared_rounds + self.runs.get(shown.run, 0))",
        new="mute",
        tests=(f"{OF_DOUBTS}::test_where_an_anchor_is_mute_a_receipt_may_not_say_more_rounds_than_it_knows",),
    ),
    Mutant(
        name="doubt-cleared-by-who-noted-it",
        fault="An anchor that says that its branch lacks a receipt clears the doubt all the same, far from its end: a "
        "round is charged nowhere.",
        file="fedtune/privacy/ledger/restored.py",
        old="mute = not hashes and shown not in self.doubts and",
        new="mute = not hashes and",
        tests=(f"{OF_DOUBTS}::test_where_a_branch_is_mute_its_own_doubt_stays",),
    ),
    Mutant(
        name="denied-and-restored",
        fault="A run that a person denied starts after a restore.",
        file=HISTORY,
        old="        self.denied |= restored.denied\n",
        new="",
        tests=(f"{OF_DOUBTS}::test_a_restore_forgets_neither_a_denial_nor_a_cap",),
    ),
    Mutant(
        name="users-forgotten-by-a-restore",
        fault="After a restore a column of visits says who a user is, where one of patients did.",
        file=HISTORY,
        old="        self.users.known |= restored.users\n",
        new="",
        tests=(f"{OF_DOUBTS}::test_a_restore_does_not_forget_who_a_user_is",),
    ),
    Mutant(
        name="cap-raised-by-a-restore",
        fault="A lifetime cap that was lowered is higher again after a restore, and nothing shows it.",
        file=LEDGER,
        old="caps=_beyond(self.history.caps, anchor.caps),",
        new="caps=(),",
        tests=(f"{OF_DOUBTS}::test_a_restore_forgets_neither_a_denial_nor_a_cap",),
    ),
    Mutant(
        name="anchor-half-signed",
        fault="Doubts and denials of an anchor are not signed: whoever holds it takes one of them out.",
        file="fedtune/privacy/ledger/chain.py",
        old='        del said["signature"]\n',
        new='        del said["signature"], said["doubts"], said["denied"]\n',
        tests=("tests/privacy/test_chain.py::test_a_head_survives_its_file_and_every_field_is_signed",),
    ),
)
