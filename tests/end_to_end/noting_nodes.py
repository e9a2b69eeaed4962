"""A program: `fedtune` in which every site also notes where it answered, as an empty file in the folder NOTED.

A file's name is what was asked, the site's number, and of the actor that answered its Ray node, process and GPUs.
"""

import os
import sys
from pathlib import Path
from typing import Any

from fedtune.cli.main import main
from fedtune.flower import simulation


def noting(plain: Any, into: str) -> Any:
    """What makes a client app that notes and then does what that of `plain` does."""

    def made(*given: Any) -> Any:
        app = plain(*given)

        # Ray sends a function of this program as it is written.
        def noted(message: Any, context: Any) -> Any:
            import ray

            actor = ray.get_runtime_context()
            gpus = "+".join(actor.get_accelerator_ids()["GPU"])
            where = f"{actor.get_node_id()},{os.getpid()},{gpus}"
            site = context.node_config["partition-id"]
            Path(into, f"{message.metadata.message_type},{site},{where}").touch()
            return app(message, context)

        return noted

    return made


if __name__ == "__main__":
    simulation.simulated_client_app = noting(simulation.simulated_client_app, os.environ["NOTED"])
    sys.exit(main(sys.argv[1:]))
