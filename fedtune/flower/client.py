"""Dispatch of the lead's messages at a site.

Real sites, simulated sites and sites behind a Unix socket share this code.
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
    """Build the Flower context of a node, with an empty state."""
    return Context(run_id, node_id, dict(node_config), state=RecordDict(), run_config={})


def make_answering(open_site: Callable[[str], Site], *, name: str) -> Answering:
    """Create the function that answers the lead's messages for the site `name`.

    The function never raises an exception, because Flower would send its type and text to the server.

    Args:
        open_site: opens the site with its ledger for a run with the given settings, and may raise any exception.  The
            settings are unvalidated JSON, or an empty string if the site already has them.
        name: the name of the site.
    """

    def reply(kind: str, created_at: float, content: RecordDict) -> RecordDict:
        if kind == "query":
            return RecordDict({flower_records.SITE: ConfigRecord({"name": name})})
        if kind == f"query.{flower_records.END}":
            return _end_run(open_site, content, name=name)
        reason = Reason.MALFORMED_REQUEST
        try:
            with translate_panics():
                answer, settings = _READERS[kind](content), flower_records.to_settings(content)
                reason = Reason.SITE_ERROR
                site = open_site(settings)
                site.ledger.set_server_time(created_at)
                return answer(site)
        except Exception:
            log.exception("site %s could not answer", name)
        refusal = Refusal(site=name, run="", round=0, reason=reason)
        return flower_records.from_reply(Reply(body=refusal, receipt=None))

    return reply


class SiteApp:
    """Flower app of a real site; `open_site` opens the site for each message (see `make_answering`)."""

    def __init__(self, open_site: Callable[[str], Site], *, name: str) -> None:
        self.answering = make_answering(open_site, name=name)

    def answer(self, message: Message) -> Message:
        """Answer a message with any content; raises only for a message type that has no reply in Flower."""
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


def _end_run(open_site: Callable[[str], Site], content: RecordDict, *, name: str) -> RecordDict:
    receipt = None
    try:
        with translate_panics():
            signed = flower_records.to_signed(content)
            adapter = flower_records.to_adapter(content) if flower_records.ADAPTER in content else None
            receipt = end_run(open_site(""), signed, adapter)
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
