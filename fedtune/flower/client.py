"""The ClientApp: one site's end of Flower."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.federation.protocol import Reply
from fedtune.federation.site import Site, answer, consider, end_run
from fedtune.flower import records
from fedtune.privacy.release import Reason, Refusal
from fedtune.spec import panics_as_errors

log = logging.getLogger(__name__)

_Answer = Callable[[Site], Reply]


def make_client_app(site_of: Callable[[Context, str], Site], name_of: Callable[[Context], str]) -> ClientApp:
    """A ClientApp that answers as the site that `site_of` finds for a node.

    Nothing it does can raise into Flower, which would send an exception's type and text to the server.

    Args:
        site_of: opens the site with its ledger, for a run with these settings (JSON, unchecked; empty where a site
            has them already); may fail.
        name_of: the site's public name; cannot fail.
    """
    app = ClientApp()

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        return Message(RecordDict({records.SITE: ConfigRecord({"name": name_of(context)})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(message, context, _to_round)

    @app.query(records.INVITE)
    def invite(message: Message, context: Context) -> Message:
        return _reply(message, context, _to_invitation)

    @app.query(records.END)
    def end(message: Message, context: Context) -> Message:
        receipt = None
        try:
            with panics_as_errors():
                signed, adapter = records.to_end(message.content)
                receipt = end_run(site_of(context, ""), signed, adapter)
        except Exception:
            log.exception("%s could not end a run", name_of(context))
        return Message(records.from_receipt(receipt), reply_to=message)

    def _reply(message: Message, context: Context, read: Callable[[RecordDict], _Answer]) -> Message:
        reason = Reason.MALFORMED_REQUEST
        try:
            with panics_as_errors():
                answer, settings = read(message.content), records.to_settings(message.content)
                reason = Reason.SITE_ERROR
                content = records.from_reply(answer(site_of(context, settings)))
                return Message(content, reply_to=message)
        except Exception:
            log.exception("%s could not answer", name_of(context))
        refusal = Refusal(site=name_of(context), run="", round=0, reason=reason)
        return Message(records.from_reply(Reply(body=refusal, receipt=None)), reply_to=message)

    return app


def _to_round(content: RecordDict) -> _Answer:
    signed, adapter = records.to_request(content)
    return lambda site: answer(site, signed, adapter)


def _to_invitation(content: RecordDict) -> _Answer:
    signed = records.to_signed(content)
    return lambda site: consider(site, signed)
