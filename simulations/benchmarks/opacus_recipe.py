"""The peers' side of the benchmarks: a fedtune experiment's model and records, for code that knows Opacus alone.

`prepare` writes what an experiment trains, in a process of its own.  The rest uses torch, transformers, PEFT and Opacus
as their users do: a base with LoRA, a mean over the batch as loss, `PrivacyEngine.make_private`.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel

Row = tuple[torch.Tensor, torch.Tensor]
"""Token ids (t,), and the class ()."""
NOISE, CLIP, RATE = 1.5, 1.0, 0.1


@dataclass(frozen=True)
class Work:
    """What an experiment trains.

    Attributes:
        base: the folder of its base model.
        sites: the records of each.
        classes: how many.
        lora: arguments of PEFT's own settings.
        sampling_rate: of each step.
    """

    base: str
    sites: tuple[tuple[Row, ...], ...]
    classes: int
    lora: dict[str, Any]
    sampling_rate: float

    @classmethod
    def read(cls, folder: Path) -> Work:
        """What `prepare` wrote."""
        found = pickle.loads((folder / "work.pickle").read_bytes())
        assert isinstance(found, cls)
        return found


def prepare(settings: list[str], folder: Path) -> None:
    """Write what an experiment trains into `folder`, from a process that ends: the benchmark's own stays small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_prepare, (settings, folder))


def _prepare(settings: list[str], folder: Path) -> None:
    from unittest.mock import patch

    from fedtune.api.compose import compose_run
    from fedtune.model.base_model import load_base, save_as_plain_model
    from fedtune.sites import shared_model

    config = compose_run([*settings, "privacy.epsilon=8", "model.dtype=float32"])
    with patch.object(shared_model, "max_batch_influence", lambda *_, **__: 0.0):
        shared = shared_model.RunModel(shared_model.LoadedModel(config), config)
    sites = []
    for site in shared.records.dealt.sites:
        dataset = shared.tokenize_records(site.training, lenient=True)
        ids = (torch.as_tensor(one, dtype=torch.long) for one in dataset.input_ids)
        sites.append(tuple((one, torch.as_tensor(target)) for one, target in zip(ids, dataset.targets, strict=True)))
    lora = shared.model.base.peft_config["default"]
    work = Work(
        base=str(folder / "base"),
        sites=tuple(sites),
        classes=len(config.data.labels),
        lora={
            key: getattr(lora, key)
            for key in ("r", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
        },
        sampling_rate=config.privacy.sampling_rate,
    )
    save_as_plain_model(load_base(config.model, predicts_tokens=False), folder / "base")
    (folder / "work.pickle").write_bytes(pickle.dumps(work))


class Peer(nn.Module):
    """The frozen base with LoRA, and a layer for the classes on the mean of its last states."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        base = AutoModel.from_pretrained(work.base)
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # fedtune has none either
        self.base = get_peft_model(base, LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **work.lora))
        self.head = nn.Linear(base.config.hidden_size, work.classes, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (n, classes) of token ids (n, t); `attention` replaces the base's own reading of the mask."""
        output = self.base(input_ids=ids, attention_mask=mask if attention is None else attention)
        states, weights = output.last_hidden_state, mask[..., None].float()
        pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return self.head(10 * nn.functional.normalize(pooled, dim=-1))  # type: ignore[no-any-return]


def together(rows: Iterable[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows padded to their longest: token ids, mask, targets."""
    ids, targets = zip(*rows, strict=True)
    masks = [torch.ones_like(one) for one in ids]
    padded = (nn.utils.rnn.pad_sequence(list(some), batch_first=True) for some in (ids, masks))
    return (*padded, torch.stack(targets))


@dataclass
class Private:
    """What `make_private` gives back."""

    model: nn.Module
    optimizer: Any
    loader: Any
    loss: Any  # of logits and targets: its mean, or for ghost clipping Opacus's own, whose backward pass clips


def made_private(peer: Peer, rows: tuple[Row, ...], sampling_rate: float, *, mode: str = "hooks") -> Private:
    """Opacus's recipe: the model, SGD, and a loader of Poisson samples of so much of the rows.

    `mode` is Opacus's way to per-example gradients: "hooks", "functorch" or "ghost" (norms alone, in a first pass).
    """
    peer.train()
    trained = [one for one in peer.parameters() if one.requires_grad]
    loader = DataLoader(rows, batch_size=round(sampling_rate * len(rows)), collate_fn=together)  # type: ignore[arg-type]
    model, optimizer, *loss, private = PrivacyEngine(secure_mode=False).make_private(
        module=peer,
        optimizer=torch.optim.SGD(trained, lr=RATE),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        grad_sample_mode=mode,
    )
    return Private(model, optimizer, private, *(loss or [nn.functional.cross_entropy]))


def take_steps(private: Private, *, steps: int, most_rows: int) -> None:
    """Take that many steps of the recipe, at most an epoch, in physical batches of at most so many rows."""
    taken = 0
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=most_rows, optimizer=private.optimizer
    ) as loader:
        for ids, mask, targets in loader:
            private.optimizer.zero_grad()
            private.loss(private.model(ids, mask), targets).backward()
            private.optimizer.step()
            taken += not private.optimizer._is_last_step_skipped
            if taken == steps:
                break


def take_sorted_steps(
    private: Private, rows: tuple[Row, ...], *, sampling_rate: float, steps: int, most_rows: int
) -> None:
    """The same with each sample sorted by length before it is cut into physical batches, in a loop of one's own."""
    for _ in range(steps):
        chosen = [rows[place] for place in (torch.rand(len(rows)) < sampling_rate).nonzero().flatten().tolist()]
        chosen.sort(key=lambda row: len(row[0]))
        for begin in range(0, len(chosen), most_rows):
            private.optimizer.signal_skip_step(do_skip=begin + most_rows < len(chosen))
            ids, mask, targets = together(chosen[begin : begin + most_rows])
            private.optimizer.zero_grad()
            private.loss(private.model(ids, mask), targets).backward()
            private.optimizer.step()
