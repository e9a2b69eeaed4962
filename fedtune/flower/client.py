"""A site's answers to the lead's messages; the same code serves a real site, a simulated site, and a site behind a
socket.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.federation.protocol import Reply
from fedtune.federation.site_round import Site, answer, answer_invitation, answer_step, end_run
from fedtune.flower import flower_records
from fedtune.flower.site_socket import Answering
from fedtune.privacy.release import Offer, Reason, Refusal, Update
from fedtune.spec import ConfigError, translate_panics

log = logging.getLogger(__name__)

_Answer = Callable[[Site], RecordDict]


def make_node_context(run_id: int, node_id: int, node_config: Mapping[str, int]) -> Context:
    """Build the Flower context of a node."""
    return Context(run_id, node_id, dict(node_config), state=RecordDict(), run_config={})


def make_answering(site_of: Callable[[str], Site], *, name: str) -> Answering:
    """Create a function that answers messages for the site `name`.

    The function never raises, regardless of the message, because Flower would send the type and text of an exception to
    the server.

    Args:
        site_of: opens the site with its ledger for a run with the given settings (unvalidated JSON; empty if the site
            already has them); may raise.
        name: the name of the site.
    """

    def reply(kind: str, created_at: float, content: RecordDict) -> RecordDict:
        if kind == "query":
            return RecordDict({flower_records.SITE: ConfigRecord({"name": name})})
        if kind == f"query.{flower_records.END}":
            return _end_run(site_of, content, name=name)
        reason = Reason.MALFORMED_REQUEST
        try:
            with translate_panics():
                answer, settings = _READERS[kind](content), flower_records.to_settings(content)
                reason = Reason.SITE_ERROR
                site = site_of(settings)
                site.ledger.set_server_time(created_at)
                return answer(site)
        except Exception:
            log.exception("site %s could not answer", name)
        refusal = Refusal(site=name, run="", round=0, reason=reason)
        return flower_records.from_reply(Reply(body=refusal, receipt=None))

    return reply


class SiteApp:
    """Flower app of a real site, which `site_of` opens."""

    def __init__(self, site_of: Callable[[str], Site], *, name: str) -> None:
        self.answering = make_answering(site_of, name=name)

    def answer(self, message: Message) -> Message:
        """Answer a message, regardless of its content; raise only for a message type without a reply in Flower."""
        about = message.metadata
        content = message.content if message.has_content() else RecordDict()
        return Message(self.answering(about.message_type, about.created_at, content), reply_to=message)

    @staticmethod
    def read_answer(content: RecordDict) -> Update | Refusal | Offer | None:
        """Decode the answer to a round or an invitation from a reply; None if the reply is of another type."""
        try:
            return flower_records.to_reply(content).body
        except ConfigError:
            return None


def _end_run(site_of: Callable[[str], Site], content: RecordDict, *, name: str) -> RecordDict:
    receipt = None
    try:
        with translate_panics():
            signed = flower_records.to_signed(content)
            adapter = flower_records.to_adapter(content) if flower_records.ADAPTER in content else None
            receipt = end_run(site_of(""), signed, adapter)
    except Exception:
        log.exception("site %s could not end a run", name)
    return flower_records.from_receipt(receipt)


def _read_round(content: RecordDict) -> _Answer:
    signed, adapter = flower_records.to_signed(content), flower_records.to_adapter(content)
    return lambda site: flower_records.from_reply(answer(site, signed, adapter))


def _read_invitation(content: RecordDict) -> _Answer:
    signed = flower_records.to_signed(content)
    return lambda site: flower_records.from_reply(answer_invitation(site, signed))


def _read_sum_step(content: RecordDict) -> _Answer:
    signed, parts = flower_records.to_signed(content), flower_records.to_parts(content)
    return lambda site: flower_records.from_step(answer_step(site, signed, parts))


_READERS: Mapping[str, Callable[[RecordDict], _Answer]] = {
    "train": _read_round,
    f"query.{flower_records.INVITE}": _read_invitation,
    f"query.{flower_records.SUM}": _read_sum_step,
}
