"""A hundred sites that send an adapter of 40 million parameters: the memory of lead and server, and where time goes.

python simulations/deployment/large_adapter.py          100 sites, into large_adapter.json: 17 GB of disk, 3 times
python simulations/deployment/large_adapter.py 4        so many

Server and lead are real processes.  One more process answers for all sites, each with a ledger, a key and a connection
of its own; in place of training it moves the adapter a little, since a hundred models would measure this machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.supercore.task_identity import TaskIdentity
from local_federation import LocalFederation, environment
from safetensors.numpy import load_file

from fedtune.federation.protocol import RoundRequest
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.site_round import Prepared, Site, Trained
from fedtune.model.adapter import Adapter
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.wire.fleet import Exchange, Fleet, SiteApp
from fedtune.privacy.durable import write_durably
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.proposal import Proposal

RESULTS = Path(__file__).parent / "large_adapter.json"
ROUNDS = 1
HIDDEN, LAYERS, RANK = 1024, 4, 544
"""Of a random encoder whose adapters have 40 million parameters."""
_MOST_S = 3 * 3600.0


def measured(num_sites: int, folder: Path) -> dict[str, Any]:
    """One run; peak resident memory of the lead's and the server's whole processes."""
    sites = [f"site-{number:03d}" for number in range(1, num_sites + 1)]
    _save_model(folder / "model")
    model = [f"model.path={folder / 'model'}", f"lora.rank={RANK}", f"lora.alpha={RANK}"]
    run = [f"federation.num_rounds={ROUNDS}", "training.local_steps=1", "federation.round_timeout_s=7200"]
    data = ["data.train_fraction=1.0", "data.declared_sizes=100", "evaluation.max_tokens=512"]
    made = LocalFederation(folder, ["experiment=debug", *model, *run, *data], sites=sites)
    with made.server_up():
        players = subprocess.Popen([sys.executable, __file__, "play", str(folder), *sites], env=environment())
        try:
            words = [
                *made.overrides,
                f"sites=[{','.join(sites)}]",
                "name=large",
                "runtime.num_threads=1",
                "runtime.micro_batch_tokens=32",
                "federation.update_dtype=float32",
            ]
            began = time.monotonic()
            lead = subprocess.Popen(
                [sys.executable, "-m", "fedtune", "run", "--kit", "fed/lead", *words], cwd=folder, env=environment()
            )
            asked, loading_peak, peak = RunFolder(folder / "runs/large").asked, 0, 0
            while lead.poll() is None:
                peak = _peak(lead.pid) or peak
                if asked.exists() and not loading_peak:  # the first round begins: from here on it is counted anew
                    loading_peak = peak
                    Path(f"/proc/{lead.pid}/clear_refs").write_text("5")
                time.sleep(0.2)
            seconds = time.monotonic() - began
            if lead.returncode:
                raise RuntimeError(f"the lead ended with {lead.returncode}")
            server_peak = _peak(made.pids["server"])
        finally:
            players.terminate()
            players.wait(timeout=60)
    result = json.loads((folder / "runs/large/run.json").read_text())
    adapter = load_file(next((folder / "runs/large/adapter").glob("adapter*.safetensors")))
    (first,) = result["rounds"]
    assert len(first["sites"]) == num_sites, first["failed_sites"]
    return {
        "parameters": sum(value.size for value in adapter.values()),
        "bytes_up": first["bytes_up"],
        "bytes_down": first["bytes_down"],
        "seconds_of_the_round": first["seconds"],
        "seconds_in_all": seconds,
        "lead_peak_bytes_before_rounds": loading_peak,
        "lead_peak_bytes_in_rounds": peak,
        "server_peak_bytes": server_peak,
    }


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)  # of the dead: none


def _save_model(folder: Path) -> None:
    """A random encoder as wide as a large one, with the tokenizer of the tiny random one."""
    import torch
    from transformers import BertConfig, BertModel

    from fedtune.model.base_model import load_tokenizer
    from fedtune.model.spec import ModelSpec

    tokenizer = load_tokenizer(ModelSpec(path="random:bert"))
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 4 * HIDDEN}
    BertModel(BertConfig(vocab_size=len(tokenizer), num_attention_heads=16, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def play(folder: Path, sites: list[str]) -> None:
    """Answer for all sites, one after the other, until this process is ended."""
    nodes = [_Player(folder, site) for site in sites]
    ends = time.monotonic() + _MOST_S
    while time.monotonic() < ends:
        if not sum([node.answered_one() for node in nodes]):
            time.sleep(1.0)


class _Player:
    """A site's connection and ledger, with something else in training's place."""

    def __init__(self, folder: Path, name: str) -> None:
        kit = Kit.read(folder / name / "kit", kind="site")
        kit.check_certificate(datetime.now(UTC))
        self._folder, self._files = folder, kit.site_files(folder / name / "site.toml")
        self._app = SiteApp(lambda settings: self._site(), name=name)
        self._fleet = Fleet(kit.server, kit.tls())
        self._fleet.activate()

    def answered_one(self) -> bool:
        # Flower keeps for the whole process who sends a message.
        TaskIdentity.node_id = self._fleet._activated.node_id
        message = self._fleet.receive()
        if message is None:
            return False
        exchange = Exchange(message)
        self._app.answer(exchange)
        self._fleet.reply(exchange.reply)
        return True

    def _site(self) -> Site:
        return _MovingSite(self._files.open(), RunFolder(self._folder / "runs/large").saved_checkpoints[0])


class _MovingSite(Site):
    """Moves each value a little in place of training."""

    def __init__(self, ledger: Ledger, first: Path) -> None:
        super().__init__(ledger)
        self._first = first

    def prepare(self, proposal: Proposal) -> Prepared:
        saved = load_file(self._first).items()
        tensors = {name.removeprefix("adapter/"): v for name, v in saved if name.startswith("adapter/")}
        size = self.ledger.policy.declared_size(proposal.dataset)
        return Prepared(proposal=proposal, template=Adapter(tensors), declared_size=size, update_dtype="float32")

    def train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> Trained:
        draw, moved = np.random.default_rng(), {}
        for name, value in adapter.tensors.items():
            moved[name] = value + np.float32(1e-6) * draw.standard_normal(value.shape, np.float32)
        return Trained(adapter=Adapter(moved))


if __name__ == "__main__":
    if sys.argv[1:2] == ["play"]:
        play(Path(sys.argv[2]), sys.argv[3:])
        raise SystemExit
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as scratch:
        found = measured(number, Path(scratch))
    found |= {"sites": number, "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    print(json.dumps(found, indent=1))
    write_durably(RESULTS, json.dumps(found, indent=1).encode() + b"\n")
