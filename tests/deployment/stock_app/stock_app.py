"""A stock Flower app without fedtune: it averages NumPy arrays and searches each site for secrets."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


def can_read(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_uid != os.geteuid() and bool(path.read_bytes())
    return False


@client.train()
def train(message: Message, context: Context) -> Message:
    (weights,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    result = {
        "files": sum(can_read(Path(path)) for path in str(context.run_config["secrets"]).split("|")),
        "processes": sum(map(can_read, Path("/proc").glob("*/environ"))),
        "modules": sum(name.startswith("fedtune") for name in sys.modules),
        "user": os.geteuid(),
    }
    metrics = MetricRecord({"num-examples": 10, **result})
    return Message(RecordDict({"arrays": ArrayRecord([weights + 1.0]), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=1)
    assert result.arrays is not None
    figures = {"averaged": result.arrays.to_numpy_ndarrays()[0].tolist(), **result.train_metrics_clientapp[1]}
    Path(str(context.run_config["into"])).write_text(json.dumps(figures))
