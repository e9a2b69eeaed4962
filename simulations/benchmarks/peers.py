"""The same work as peers: one round of fedtune, of Flower's simulation with Opacus, and of a plain Opacus loop.

    python simulations/benchmarks/peers.py                        five rounds of each, into peers.json and the README
    python simulations/benchmarks/peers.py --times 1 --steps 1    whether it works

LoRA of rank 8 on query and value of all layers of MiniLM and a layer for 77 classes, four sites of Banking77, 5 steps a
round at rate 0.2.  Each kind is a process that has loaded everything and taken a first round; then they take turns, one
round each, so that whatever else the machine does meets all alike.

- **fedtune**: `fedtune simulate` in float32, with its ledgers and checkpoints; a process for each core
  shares each step, as that command chooses.
- **fedtune, auto**: the same in the number format that it measures to be the faster one (`model.dtype=auto`).
- **fedtune, mixed**: the same with frozen layers that multiply in bfloat16 (`model.dtype=mixed`); peers do in float32.
- **fedtune, one process**: in float32 with `runtime.num_devices=1`, which takes less memory.
- **Flower and Opacus**: Flower's simulation with one client on all cores at a time, whose training is that of Flower's
  own example for Opacus: `make_private` on a data loader, an epoch (here: so many steps), weights sent back to FedAvg;
  added is Opacus's `BatchMemoryManager`, without which it takes almost twice as long.
- **Opacus, sorted**: a loop by hand in one process, each Poisson sample sorted by length, as the loader cannot; its
  per-example gradients by hooks, by functorch, or never made, by ghost clipping.
- **opake, sorted**: the same loop with opake, where it is installed; it needs no place in fedtune's environment.

Physical batches of both have 16 rows, the fastest number of 16, 32, 64 and all.  Memory is the most that a process and
those that it started hold, shared pages counted once (Linux's PSS, looked at every second).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import readme_table

from fedtune.privacy.durable import write_durably
from fedtune.training.machine import count_usable_cores

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- peers: written by peers.py -->", "<!-- end of peers -->"
OURS = "fedtune"
SETTINGS = ["experiment=banks_intents", "lora=qv", "privacy.sampling_rate=0.2"]
MAX_ROWS = 16
READY = "ready"
Round = Callable[[], float]
"""Takes one and returns its seconds."""


def of_fedtune(
    folder: Path, *settings: str, rounds: int, steps: int, processes: int, go: Callable[[float | None], None]
) -> None:
    """A whole run, which waits for `go` before each round; the lead scores nothing."""
    from fedtune.api.compose import compose_run
    from fedtune.flower.simulation import simulate

    files = ["data.validation_file=null", "data.test_file=null"]
    own = [
        f"runtime.num_devices={processes}",
        f"federation.num_rounds={rounds}",
        f"training.local_steps={steps}",
        "tracking=quiet",
    ]
    config = compose_run([*SETTINGS, *files, *own, *settings, "privacy.epsilon=8", "name=peers"])

    class Waits:
        def on_preparing(self, what: str, done: int, total: int) -> None: ...
        def note(self, text: str) -> None: ...
        def on_site_replied(self, number: int) -> None: ...
        def on_site_answered(self, *_: Any, **__: Any) -> None: ...
        def on_prepared(self, shared: Any, proposal: Any, state: Any) -> None:
            go(None)

        def on_round_finished(self, state: Any) -> None:
            go(state.rounds[-1].seconds)

    simulate(config, folder, Waits())


def of_opacus(
    folder: Path, *, mode: str = "hooks", rounds: int, steps: int, go: Callable[[float | None], None]
) -> None:
    """The loop by hand: the sites one after the other from the round's weights, then their mean."""
    import torch
    from opacus_recipe import Peer, Work, made_private, take_sorted_steps

    work = Work.read(folder)
    peer = Peer(work)
    trained = {name: one for name, one in peer.named_parameters() if one.requires_grad}
    private = made_private(peer, work.sites[0], work.sampling_rate, mode=mode)
    seconds = None
    for _ in range(rounds):
        go(seconds)
        began = time.monotonic()
        start = {name: one.detach().clone() for name, one in trained.items()}
        total = {name: torch.zeros_like(one) for name, one in start.items()}
        for rows in work.sites:
            with torch.no_grad():
                for name, one in trained.items():
                    one.copy_(start[name])
            private.optimizer.expected_batch_size = round(work.sampling_rate * len(rows))
            take_sorted_steps(private, rows, sampling_rate=work.sampling_rate, steps=steps, most_rows=MAX_ROWS)
            for name, one in trained.items():
                total[name] += one.detach() / len(work.sites)
        with torch.no_grad():
            for name, one in trained.items():
                one.copy_(total[name])
        seconds = time.monotonic() - began
    go(seconds)


def of_opake(folder: Path, *, rounds: int, steps: int, go: Callable[[float | None], None]) -> None:
    """The loop by hand with opake: per-example gradients by `torch.func`, each sample sorted as in `of_opacus`.

    It needs opake-engine, opake-dpsgd, opake-base, opake-optimizers and optree, installed with `pip install --no-deps`.
    """
    import torch
    from opacus_recipe import CLIP, NOISE, RATE, Peer, Work, together
    from opake.dpsgd.clipping import clipped_grad
    from opake.dpsgd.noise import gaussian_noise
    from opake.random import key

    work = Work.read(folder)
    peer = Peer(work)
    peer.base.get_base_model().set_attn_implementation("eager")
    start = {name: one.detach() for name, one in peer.named_parameters() if one.requires_grad}

    def loss(trained: dict[str, Any], ids: Any, mask: Any, target: Any) -> Any:
        # Added to the scores of attention: the base would look whether a mask has padding, which does not vectorize.
        attention = torch.where(mask > 0, 0.0, -1e9)[None, None, None]
        logits = torch.func.functional_call(peer, trained, (ids[None], mask[None], attention))
        return torch.nn.functional.cross_entropy(logits, target[None])

    clip, clip_state = clipped_grad(loss, clipping_norm=CLIP, batch_argnums=(1, 2, 3))
    add_noise, noise_state = gaussian_noise(noise_multiplier=NOISE, key=key(0))
    seconds = None
    for _ in range(rounds):
        go(seconds)
        began = time.monotonic()
        total = {name: torch.zeros_like(one) for name, one in start.items()}
        for rows in work.sites:
            trained = dict(start)
            for _ in range(steps):
                places = (torch.rand(len(rows)) < work.sampling_rate).nonzero().flatten().tolist()
                chosen = sorted((rows[place] for place in places), key=lambda row: len(row[0]))
                summed: Any = None
                for begin in range(0, len(chosen), MAX_ROWS):
                    clipped, clip_state = clip(trained, *together(chosen[begin : begin + MAX_ROWS]), state=clip_state)
                    added = {name: one + (summed.pytree[name] if summed else 0) for name, one in clipped.pytree.items()}
                    summed = replace(clipped, pytree=added)
                noisy, noise_state = add_noise(summed, noise_state)
                rate = RATE / (work.sampling_rate * len(rows))
                trained = {name: one - rate * noisy.pytree[name] for name, one in trained.items()}
            for name, one in trained.items():
                total[name] += one / len(work.sites)
        start = total
        seconds = time.monotonic() - began
    go(seconds)


def of_flower(folder: Path, *, rounds: int, steps: int, go: Callable[[float | None], None]) -> None:
    """Flower's simulation on Ray, its FedAvg, and clients as in its example for Opacus."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    cores = count_usable_cores()
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch
        from opacus_recipe import Peer, Work, made_private, take_steps

        torch.set_num_threads(cores)
        work = Work.read(folder)
        rows = work.sites[int(context.node_config["partition-id"])]
        peer = Peer(work)
        peer.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        take_steps(made_private(peer, rows, work.sampling_rate), steps=steps, most_rows=MAX_ROWS)
        trained = {name: one.detach() for name, one in peer.named_parameters() if one.requires_grad}
        metrics = MetricRecord({"num-examples": len(rows)})
        return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=message)

    class Waits(FedAvg):
        began = 0.0
        seconds: float | None = None

        def configure_train(self, *args: Any) -> Iterable[Message]:
            go(self.seconds)
            self.began = time.monotonic()
            return super().configure_train(*args)

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            failed = [reply.error for reply in replies if reply.has_error()]
            if failed:
                raise RuntimeError(f"clients failed: {failed}")
            found = super().aggregate_train(server_round, replies)
            self.seconds = time.monotonic() - self.began
            return found

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        from opacus_recipe import Peer, Work

        peer = Peer(Work.read(folder))
        first = ArrayRecord({name: one.detach() for name, one in peer.named_parameters() if one.requires_grad})
        waits = Waits(fraction_evaluate=0.0)
        waits.start(grid, first, num_rounds=rounds)
        go(waits.seconds)

    backend: Any = {
        "client_resources": {"num_cpus": cores, "num_gpus": 0.0},
        "init_args": {"num_cpus": cores, "include_dashboard": False},
    }
    run_simulation(server, client, num_supernodes=len(_create_sites(folder)), backend_config=backend)


def _create_sites(folder: Path) -> tuple[Any, ...]:
    from opacus_recipe import Work

    return Work.read(folder).sites


KINDS: dict[str, Callable[..., None]] = {
    OURS: lambda folder, **how: of_fedtune(
        folder / "several", "model.dtype=float32", processes=count_usable_cores(), **how
    ),
    "fedtune, auto": lambda folder, **how: of_fedtune(
        folder / "auto", "model.dtype=auto", processes=count_usable_cores(), **how
    ),
    "fedtune, mixed": lambda folder, **how: of_fedtune(
        folder / "mixed", "model.dtype=mixed", processes=count_usable_cores(), **how
    ),
    "fedtune, one process": lambda folder, **how: of_fedtune(folder / "one", "model.dtype=float32", processes=1, **how),
    "Opacus, sorted": of_opacus,
    "Opacus, sorted, functorch": lambda folder, **how: of_opacus(folder, mode="functorch", **how),
    "Opacus, sorted, ghost clipping": lambda folder, **how: of_opacus(folder, mode="ghost", **how),
    "opake, sorted": of_opake,
    "Flower and Opacus": of_flower,
}


class Kind:
    """A process that takes a round whenever it is told to.

    Attributes:
        most_bytes: that it and those that it started have held so far.
    """

    def __init__(self, name: str, folder: Path, *, rounds: int, steps: int) -> None:
        self.most_bytes = 0
        words = ["--be", name, "--folder", str(folder), "--times", str(rounds), "--steps", str(steps)]
        python = os.pathsep.join(filter(None, [str(FOLDER), str(FOLDER.parents[1]), os.environ.get("PYTHONPATH")]))
        # Ray's processes find the modules so; threads that wait sleep, as in fedtune's own command; no telemetry.
        more = {"PYTHONPATH": python, "OMP_WAIT_POLICY": "PASSIVE"}
        more |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | more,
            cwd=FOLDER.parents[1],
        )
        self._said()

    def round(self) -> float:
        """Take one, and say how many seconds it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._said())

    def end(self) -> None:
        """Wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)
        self._log.close()

    def _said(self) -> str:
        assert self._process.stdout is not None
        over = threading.Event()
        looks = threading.Thread(target=self._look, args=[over])
        looks.start()
        try:
            for line in self._process.stdout:
                if line.startswith(READY):
                    return line.removeprefix(READY)
        finally:
            over.set()
            looks.join()
        log = Path(self._log.name).read_text()
        raise RuntimeError(f"it ended:\n{log[-3000:]}")

    def _look(self, over: threading.Event) -> None:
        while not over.wait(1.0):
            self.most_bytes = max(self.most_bytes, held(self._process.pid))


def held(pid: int) -> int:
    """Bytes that a process and its descendants hold."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents.setdefault(int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.name))
        except OSError:  # it has ended
            continue
    everyone, total = [pid], 0
    for one in everyone:
        everyone += parents.get(one, [])
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def be(name: str, folder: Path, *, rounds: int, steps: int) -> None:
    """Be one of the kinds: say when a round is over, and wait to be told before the next."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever others print

    def go(seconds: float | None) -> None:
        print(READY, "" if seconds is None else seconds, file=out, flush=True)
        if not sys.stdin.readline():  # the benchmark is over, one way or the other
            os._exit(0)

    import torch

    torch.set_num_threads(count_usable_cores())
    KINDS[name](folder, rounds=rounds, steps=steps, go=go)


def measured(names: list[str], *, times: int, steps: int, written: Callable[[dict[str, Any]], None]) -> None:
    """Rounds of each kind in turn; what is known is `written` after each turn."""
    from opacus_recipe import prepare

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(SETTINGS, folder)
        kinds = {name: Kind(name, folder, rounds=times + 1, steps=steps) for name in names}
        for name, kind in kinds.items():
            print(f"{name}: first round, not counted: {kind.round():.1f} s", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(times):
            for name, kind in kinds.items():
                seconds[name].append(kind.round())
                print(f"{number + 1}. {name}: {seconds[name][-1]:.1f} s", flush=True)
            written({name: summary(seconds[name], kinds[name].most_bytes) for name in names})
        for kind in kinds.values():
            kind.end()


def summary(seconds: list[float], most_bytes: int) -> dict[str, Any]:
    """What is written of a kind."""
    return {
        "seconds": round(statistics.median(seconds), 2),
        "each": [round(one, 2) for one in seconds],
        "peak_bytes": most_bytes,
        "machine": readme_table.machine(count_usable_cores()),
    }


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """The Markdown table."""
    rows = [["", "seconds a round", "times fedtune's", "memory, GiB", "times fedtune's"], ["---", *["---:"] * 4]]
    ours = kinds[OURS]
    for name, kind in kinds.items():
        time_, memory = kind["seconds"] / ours["seconds"], kind["peak_bytes"] / ours["peak_bytes"]
        rows.append(
            [name, f"{kind['seconds']:.1f}", f"{time_:.2f}", f"{kind['peak_bytes'] / 2**30:.2f}", f"{memory:.2f}"]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(kinds: dict[str, dict[str, Any]], into: Path, *, steps: int) -> None:
    """Write the file, and the README's table where the file is the one beside it."""
    rounds = len(next(iter(kinds.values()))["each"])
    machine = readme_table.machine(count_usable_cores())
    result = {"rounds": rounds, "steps": steps, "hardware": machine, "kinds": kinds}
    write_durably(into, json.dumps(result, indent=1).encode() + b"\n")
    if into == FOLDER / "peers.json":
        about = f"Medians of {rounds} rounds of {steps} steps, {machine}."
        readme_table.put(BEGIN, END, f"{table(kinds)}\n\n{about}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="rounds of each kind that count")
    parser.add_argument("--steps", type=int, default=5, help="steps of a round, at most 5")
    here = [name for name in KINDS if "opake" not in name or importlib.util.find_spec("opake")]
    parser.add_argument("--only", nargs="*", default=here, choices=list(KINDS))
    parser.add_argument("--into", type=Path, default=FOLDER / "peers.json")
    parser.add_argument("--be", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.be:
        be(asked.be, asked.folder, rounds=asked.times, steps=asked.steps)
        return
    measured(
        asked.only,
        times=asked.times,
        steps=asked.steps,
        written=lambda kinds: write(kinds, asked.into, steps=asked.steps),
    )


if __name__ == "__main__":
    main()
