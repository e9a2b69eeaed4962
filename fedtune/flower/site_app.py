"""The ClientApp that a stock SuperNode starts for each message: it hands the message to the site's own process.

It holds no record, no model and no key, and imports neither torch nor fedtune's own layers.  The socket is named by the
site's operator, in `--node-config`, and never by a run, whose lead could otherwise have it write to any socket of the
machine.

In Flower's simulation engine the same app answers as a simulated site, which `partition-id` names
(`local_engine.py`).  Only an actor of Ray's does: a SuperNode's app takes part in no simulation, whatever a run says.
"""

from __future__ import annotations

import sys

from flwr.app import Context, RecordDict

from fedtune.flower.site_socket import ask_site, make_client_app

SOCKET = "/run/fedtune/site.sock"


class SiteAway(Exception):
    """The site's process gave no answer; the lead will ask again."""


def forward_message(context: Context, kind: str, created_at: float, content: RecordDict) -> RecordDict:
    """Forward a message to the site's process and return its answer.

    Raises:
        SiteAway: there is no answer.  Flower sends the text to its server, so the text is only the name of an error
            class.
    """
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        from fedtune.flower.local_engine import answer_as_simulated_site  # slow to import, and needs all of fedtune

        site = answer_as_simulated_site(str(context.run_config["run"]), int(context.node_config["partition-id"]))
        return site(kind, created_at, content)
    try:
        return ask_site(str(context.node_config.get("fedtune-socket", SOCKET)), kind, created_at, content)
    except Exception as error:
        raise SiteAway(type(error).__name__) from None


app = make_client_app(forward_message)
