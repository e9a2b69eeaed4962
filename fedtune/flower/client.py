"""A site's end of Flower: the ClientApp of every site, real or simulated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.federation.protocol import Reply
from fedtune.federation.site_round import Site, answer, consider, end_run, take_step
from fedtune.flower import flower_records
from fedtune.privacy.release import Reason, Refusal
from fedtune.spec import panics_as_errors

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
