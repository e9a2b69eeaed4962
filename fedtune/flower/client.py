"""A site's end of Flower: the ClientApp of every site, and a real site's way to call it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.federation.protocol import Reply, Signed
from fedtune.federation.site_round import Site, answer, consider, end_run, take_step
from fedtune.flower import flower_records
from fedtune.privacy.release import Offer, Reason, Refusal, Update
from fedtune.spec import ConfigError, panics_as_errors

log = logging.getLogger(__name__)

_Answer = Callable[[Site], RecordDict]


def context_of(run_id: int, node_id: int, node_config: Mapping[str, int]) -> Context:
    """Flower's own words to a node's app about itself."""
    return Context(run_id, node_id, dict(node_config), state=RecordDict(), run_config={})


def make_client_app(site_of: Callable[[Context, str], Site], name_of: Callable[[Context], str]) -> ClientApp:
    """A ClientApp that answers as the site that `site_of` finds for a node, by the public name of `name_of`.

    `site_of` opens the site with its ledger, for a run with these settings (JSON, unchecked; empty where a site has
    them already), and may fail; `name_of` cannot.  Nothing the app does can raise into Flower, which would send an
    exception's type and text to the server.
    """
    app = ClientApp()

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        return Message(RecordDict({flower_records.SITE: ConfigRecord({"name": name_of(context)})}), reply_to=message)

    @app.query(flower_records.END)
    def end(message: Message, context: Context) -> Message:
        content, receipt = message.content, None
        try:
            with panics_as_errors():
                signed = flower_records.to_signed(content)
                adapter = flower_records.to_adapter(content) if flower_records.ADAPTER in content else None
                receipt = end_run(site_of(context, ""), signed, adapter)
        except Exception:
            log.exception("%s could not end a run", name_of(context))
        return Message(flower_records.from_receipt(receipt), reply_to=message)

    def reply(message: Message, context: Context, *, read: Callable[[RecordDict], _Answer]) -> Message:
        reason = Reason.MALFORMED_REQUEST
        try:
            with panics_as_errors():
                answer, settings = read(message.content), flower_records.to_settings(message.content)
                reason = Reason.SITE_ERROR
                site = site_of(context, settings)
                site.ledger.asked_at(message.metadata.created_at)
                return Message(answer(site), reply_to=message)
        except Exception:
            log.exception("%s could not answer", name_of(context))
        refusal = Refusal(site=name_of(context), run="", round=0, reason=reason)
        return Message(flower_records.from_reply(Reply(body=refusal, receipt=None)), reply_to=message)

    app.train()(partial(reply, read=_to_round))
    app.query(flower_records.INVITE)(partial(reply, read=_to_invitation))
    app.query(flower_records.SUM)(partial(reply, read=_to_sum))
    return app


def _to_round(content: RecordDict) -> _Answer:
    signed, adapter = flower_records.to_signed(content), flower_records.to_adapter(content)
    return lambda site: flower_records.from_reply(answer(site, signed, adapter))


def _to_invitation(content: RecordDict) -> _Answer:
    signed = flower_records.to_signed(content)
    return lambda site: flower_records.from_reply(consider(site, signed))


def _to_sum(content: RecordDict) -> _Answer:
    signed, parts = flower_records.to_signed(content), flower_records.to_parts(content)
    return lambda site: flower_records.from_step(take_step(site, signed, parts))


_LONGEST_S = 30 * 86400.0  # no lead waits longer for an answer


@dataclass
class Exchange:
    """A message and its answer."""

    message: Message
    _reply: Message | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        return str(self.message.metadata.message_type)

    @property
    def request(self) -> Signed:
        """The lead's signed word in the message; raises ConfigError where it holds none."""
        return flower_records.to_signed(self.message.content)

    @property
    def reply(self) -> Message:
        assert self._reply is not None, "answered first"
        return self._reply

    @property
    def answered(self) -> Update | Refusal | Offer | None:
        """The answer to a round or an invitation, in a word; None for another kind of message."""
        try:
            return flower_records.to_reply(self.reply.content).body
        except ConfigError:
            return None

    def is_void(self, now: float) -> bool:
        """The server takes no answer any more; `now` in seconds since 1970."""
        until = self.message.metadata.created_at + self.message.metadata.ttl
        return not now <= until <= now + _LONGEST_S  # a time may be no number, or endless


class SiteApp:
    """The ClientApp of a real site, which `site_of` opens for a run with these settings."""

    def __init__(self, site_of: Callable[[str], Site], *, name: str) -> None:
        self._app = make_client_app(lambda _, settings: site_of(settings), lambda _: name)
        self._name = name

    def answer(self, exchange: Exchange) -> None:
        """Answer a message, whatever it is; nothing is raised, and no text of an exception leaves."""
        message = exchange.message
        context = context_of(message.metadata.run_id, message.metadata.dst_node_id, {})
        try:
            with panics_as_errors():
                exchange._reply = self._app(message, context)
        except Exception:  # an action that this app does not have, for instance
            log.exception("a message could not be answered")
            refusal = Refusal(site=self._name, run="", round=0, reason=Reason.MALFORMED_REQUEST)
            content = flower_records.from_reply(Reply(body=refusal, receipt=None))
            exchange._reply = Message(content, reply_to=message)
