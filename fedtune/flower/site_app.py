"""ClientApp of a stock SuperNode, which forwards each message to the site's own process.

The app has no access to records, model or keys, and imports neither torch nor fedtune's other layers.  The operator of
the site sets the path of the socket in `--node-config`.  A run cannot set it, because a lead could otherwise make the
app write to any socket of the machine.

In Flower's simulation engine, the same app answers as the simulated site of its `partition-id` (`local_engine.py`), but
only in a Ray actor, so that no run can make a SuperNode take part in a simulation.
"""

from __future__ import annotations

import sys

from flwr.app import Context, RecordDict

from fedtune.flower.site_socket import ask_site, make_client_app

SOCKET = "/run/fedtune/site.sock"


class SiteUnavailable(Exception):
    """Raised if the site's process did not answer; the lead will repeat the question."""


def forward_message(context: Context, kind: str, created_at: float, content: RecordDict) -> RecordDict:
    """Forward a message to the site's process and return its answer.

    Raises:
        SiteUnavailable: the process did not answer.  The text is only the name of an error class, because Flower sends
            it to its server.
    """
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        from fedtune.flower.local_engine import answer_as_simulated_site  # slow to import, and needs all of fedtune

        site = answer_as_simulated_site(str(context.run_config["run"]), int(context.node_config["partition-id"]))
        return site(kind, created_at, content)
    try:
        return ask_site(str(context.node_config.get("fedtune-socket", SOCKET)), kind, created_at, content)
    except Exception as error:
        raise SiteUnavailable(type(error).__name__) from None


app = make_client_app(forward_message)
