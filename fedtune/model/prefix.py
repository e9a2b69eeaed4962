"""The frozen layers below the first adapted one: their output is the same in every step, so it can be kept.

An adapter on the last layers of a base leaves the layers before them as they are.  What they make of a record
depends on that record and the public base alone, so a site may compute it once and start every later pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


class FrozenPrefix:
    """Lets a base start behind its first `depth` layers.

    Args:
        layers: the base's stack of layers; those before the first one that trains are made skippable.

    Attributes:
        depth: how many layers can be skipped; 0 when the first one trains.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
        self.depth = trains.index(True) if True in trains else 0
        self._given: torch.Tensor | None = None
        self._recording = False
        for number in range(self.depth):
            layer = layers[number]
            layer.forward = partial(self._run, layer.forward, number == self.depth - 1)

    @contextmanager
    def given(self, states: torch.Tensor | None) -> Iterator[None]:
        """Take `states`, (n, t, h), for the output of the skipped layers; None skips nothing."""
        self._given = states
        try:
            yield
        finally:
            self._given = None

    def states(self, run: Callable[[], object]) -> torch.Tensor | None:
        """What the skipped layers put out, (n, t, h), while `run` calls the base; the rest of the base does not run.

        None when there is nothing to skip, or when the layers hand on more than one tensor.
        """
        if not self.depth:
            return None
        self._recording = True
        try:
            with torch.no_grad():
                run()
        except _Reached as reached:
            return reached.output if isinstance(reached.output, torch.Tensor) else None
        finally:
            self._recording = False
        return None

    def _run(self, forward: Callable[..., Any], last: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._given is not None:
            return self._given
        output = forward(hidden, *args, **kwargs)
        if last and self._recording:
            raise _Reached(output)
        return output


class _Reached(Exception):
    """Ends a forward pass where nothing more of it is wanted."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output
