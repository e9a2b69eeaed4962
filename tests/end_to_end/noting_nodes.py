"""The `fedtune` command with a Flower bundle whose app also records where each simulated site answered.

Each answer is an empty file in the folder `noted` next to the runs' folder. Its name contains the request, the site's
number, and the Ray node, process and GPUs of the actor that answered.
"""

import os
import sys
from pathlib import Path

from flwr.app import Context, RecordDict

from fedtune.flower import bundle
from fedtune.flower.site_app import forward_message
from fedtune.flower.site_socket import make_client_app


def note_node(context: Context, kind: str, created_at: float, content: RecordDict) -> RecordDict:
    import ray

    actor = ray.get_runtime_context()
    gpus = "+".join(actor.get_accelerator_ids()["GPU"])
    site = context.node_config["partition-id"]
    folder = Path(str(context.run_config["run"])).parents[3] / "noted"
    Path(folder, f"{kind},{site},{actor.get_node_id()},{os.getpid()},{gpus}").touch()
    return forward_message(context, kind, created_at, content)


app = make_client_app(note_node)

if __name__ == "__main__":
    from fedtune.cli.main import main

    bundle._BUNDLE = bundle._BUNDLE.replace("fedtune.flower.site_app:app", "tests.end_to_end.noting_nodes:app")
    sys.exit(main(sys.argv[1:]))
