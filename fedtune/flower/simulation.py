"""Simulation of a federation on one machine, over an in-process grid or in Flower's engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import RunConfig
from fedtune.federation.invitation import ProposedRun
from fedtune.federation.site_round import Site
from fedtune.flower.averaging import Average
from fedtune.flower.client import make_answering, make_node_context
from fedtune.flower.grid_transport import GridTransport
from fedtune.flower.internals import set_metadata, set_sender_ids
from fedtune.flower.local_engine import run_on_flower
from fedtune.flower.site_socket import make_client_app
from fedtune.runs.federation_run import Engine, FederationRun, Listener
from fedtune.runs.results import RunResult
from fedtune.sites.data_warnings import list_site_data_warnings
from fedtune.sites.run_cache import RunCache
from fedtune.sites.virtual_site import RECEIPTS, Participants, fix_number_format

_RUN_ID = 1


def simulate(
    config: RunConfig,
    folder: Path,
    listener: Listener,
    *,
    cache: RunCache | None = None,
    everyone: Participants | None = None,
) -> RunResult:
    """Simulate the run `config` from the start or from its newest checkpoint, and return the content of `run.json`.

    Args:
        config: the configuration of the run; incompatible settings are rejected before training.
        folder: the run folder to write.
        listener: receives the progress of the run.
        cache: a cache of the model and its results on records, shared by several runs.
        everyone: participants of an earlier simulation to reuse; not available with Ray.
    """
    config = fix_number_format(config, folder, alone=cache is not None)
    if everyone is None:
        everyone = Participants(config, folder, progress=listener.on_preparing, cache=cache)
    everyone.records.read()

    def prepare_work() -> tuple[Sequence[str], Sequence[str]]:
        listener.on_preparing("reading the sites' records", 0, 0)
        _ = [work.examples for work in everyone.work.values()]
        everyone.sites.check_partition()
        changed = everyone.list_changed_sites() if config.resume is not None else ()
        return tuple(list_site_data_warnings(config, everyone.records.dealt)), changed

    return FederationRun(
        config=config,
        folder=folder,
        shared=everyone.shared,
        asked=ProposedRun(
            proposal=config.proposal(lead=everyone.sites.lead_key().public, plan=everyone.plan),
            key=everyone.sites.lead_key(),
            federation=config.federation,
            site_keys=everyone.identities if everyone.plan.shared else {},
        ),
        average=Average(config.federation, config.declared_sizes()),
        receipts=everyone.sites.folder / RECEIPTS,
        engine=_make_engine(config, folder, everyone, listener),
        ready=prepare_work,
    ).run_to_end(listener)


def _make_engine(config: RunConfig, folder: Path, everyone: Participants, listener: Listener) -> Engine:
    if config.runtime.kind == "ray":
        return lambda run: run_on_flower(run, config, folder, everyone.sites.folder)
    client_app = _make_client_app(config.federation.active, everyone.site)
    grid = InProcessGrid(client_app, len(config.federation.active), replied=listener.on_site_replied)
    return lambda run: run(GridTransport(grid))


def _make_client_app(names: Sequence[str], site: Callable[[int], Site]) -> ClientApp:
    def answer(context: Context, kind: str, created_at: float, content: RecordDict) -> RecordDict:
        index = int(context.node_config["partition-id"])
        return make_answering(lambda _: site(index), name=names[index])(kind, created_at, content)

    return make_client_app(answer)


class InProcessGrid:
    """Grid of `num_nodes` virtual nodes with ids 1, 2, ..., which calls `client_app` in this process.

    All sites share one frozen base model.  They train one after another, each with all threads, so that results do not
    depend on scheduling.  `client_app` must not raise exceptions.  In a round of training, `replied` is called with the
    number of replies so far.
    """

    def __init__(self, client_app: ClientApp, num_nodes: int, *, replied: Callable[[int], None]) -> None:
        self._client_app, self._replied = client_app, replied
        self._contexts = {
            index + 1: make_node_context(_RUN_ID, index + 1, {"partition-id": index, "num-partitions": num_nodes})
            for index in range(num_nodes)
        }
        # Flower sets no sender ids outside its own processes.
        set_sender_ids(run_id=_RUN_ID, node_id=0, task_id=0)

    def get_node_ids(self) -> Sequence[int]:
        return list(self._contexts)

    def receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for number, message in enumerate(messages, 1):
            answer = self.deliver(message)
            if message.metadata.message_type == MessageType.TRAIN:
                self._replied(number)
            yield answer

    def deliver(self, message: Message) -> Message:
        set_metadata(message, message_id=str(uuid.uuid4()))
        return self._client_app(message, self._contexts[message.metadata.dst_node_id])
