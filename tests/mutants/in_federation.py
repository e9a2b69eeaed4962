"""Faults between lead, server and sites: whose word counts, how far an update may go, and who pays when."""

from .mutant import Mutant

SORTING = ("tests/federation/test_aggregation.py",)
ASKING = ("tests/flower/test_invitation.py",)

FEDERATION_FAULTS = (
    Mutant(
        name="receipt-of-any-reply",
        fault="A receipt passes beside any answer, so a server puts numbers of its own in a site's place.",
        file="fedtune/federation/protocol.py",
        old="self.receipt.reply == digest_of(self.body) and ",
        new="",
        tests=SORTING,
    ),
    Mutant(
        name="reply-outside-the-signature",
        fault="The digest of the reply stands in the receipt and is not signed, so that a server can change both.",
        file="fedtune/privacy/release.py",
        old="        if not self.reply:\n            del fields",
        new="        if True:\n            del fields",
        tests=("tests/privacy/test_release.py",),
    ),
    Mutant(
        name="update-without-a-receipt",
        fault="An update without its site's signature enters the average, as in 0.1.0.",
        file="fedtune/federation/aggregation.py",
        old="        elif not reply.is_signed() and (reply.receipt or isinstance(reply.body, Update)):",
        new="        elif not reply.is_signed() and reply.receipt:",
        tests=SORTING,
    ),
    Mutant(
        name="receipt-of-another-key-counts",
        fault="An update whose receipt is signed by a key that the roster does not know enters the average.",
        file="fedtune/flower/invitation.py",
        old="                reply = replace(reply, receipt=None)",
        new="                pass",
        tests=("tests/flower/test_receipts.py",),
    ),
    Mutant(
        name="update-of-any-size",
        fault="An update of any finite value enters the average: one site's 1e30 ends the run, as in 0.1.0.",
        file="fedtune/federation/aggregation.py",
        old="        elif not reach.includes(reply.body.tensors, sent=sent):",
        new="        elif False:",
        tests=SORTING,
    ),
    Mutant(
        name="reach-without-a-norm",
        fault="An update's values are bounded one by one, and not together.",
        file="fedtune/training/optimizer.py",
        old="return math.sqrt(square) <= self.norm",
        new="return True",
        tests=("tests/training/test_reach.py",),
    ),
    Mutant(
        name="reach-of-one-step",
        fault="The bound on an update counts one of a round's steps, so that honest updates are refused.",
        file="fedtune/training/optimizer.py",
        old="for step in range(plan.local_steps)]",
        new="for step in range(1)]",
        tests=("tests/training/test_reach.py",),
    ),
    Mutant(
        name="on-after-divergence",
        fault="A run goes on from an adapter whose loss is no number; every later round is paid for nothing.",
        file="fedtune/flower/server.py",
        old="    if diverged := not _is_sound(adapter, metrics):",
        new="    if diverged := False:",
        tests=ASKING,
    ),
    Mutant(
        name="nobody-asked-beforehand",
        fault="A run begins without asking who takes part: one site's refusal costs the others a round, as in 0.1.0.",
        file="fedtune/flower/server.py",
        old="    if state.round == 0:\n        _ask",
        new="    if state.round < 0:\n        _ask",
        tests=ASKING,
    ),
    Mutant(
        name="offer-that-nobody-signed",
        fault="A server can say in a site's name that it takes part.",
        file="fedtune/flower/invitation.py",
        old="return isinstance(body, Offer) and reply.is_signed() and (",
        new="return isinstance(body, Offer) and (",
        tests=ASKING,
    ),
    Mutant(
        name="offer-to-an-old-question",
        fault="An offer that a site made before it changed its mind passes again: a server has the others charged.",
        file="fedtune/flower/invitation.py",
        old="(body.site, body.run, body.nonce) == (site, run, nonce)",
        new="(body.site, body.run) == (site, run)",
        tests=ASKING,
    ),
    Mutant(
        name="unsigned-refusal-is-final",
        fault="A refusal that nobody signed ends a run for good, so that a server ends any.",
        file="fedtune/federation/aggregation.py",
        old="            if not reply.receipt:\n                failures[site] = reply.body.reason.value\n",
        new="            if not reply.receipt:\n                failures[site] = reply.body.reason.value\n"
        "                refusals[site] = reply.body\n",
        tests=SORTING,
    ),
    Mutant(
        name="more-charged-than-planned",
        fault="A receipt of any number of rounds is believed; to compose 10**18 of them ends the lead.",
        file="fedtune/federation/lead.py",
        old=" and receipt.charged_rounds <= most_rounds",
        new="",
        tests=("tests/federation/test_lead.py",),
    ),
    Mutant(
        name="failures-not-held",
        fault="A reply waits for its schedule only where training succeeds, so that a failure's time tells of records.",
        file="fedtune/federation/site.py",
        old="    try:\n        yield\n    finally:\n        if every_s > 0:",
        new="    yield\n    if True:\n        if every_s > 0:",
        tests=("tests/federation/test_site.py",),
    ),
)
