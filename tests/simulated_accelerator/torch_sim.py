"""The torch device "sim", see sim.cpp; torch loads this module through its entry point `torch.backends`.

Environment variables:
    SIM_DEVICES        number of devices (1)
    SIM_MEMORY_MIB     memory of each (16384)
    SIM_SDPA           attention: "fused" is the CPU's fused kernel; "by_rows" depends on the number of rows; "parted"
                       gives different bits each time from 512 tokens on, unless torch is set to be deterministic
    SIM_NO_FLOAT64=1   no float64, as on Apple's devices
    SIM_POISON=0       do not fill new memory with 0xCB
    SIM_GRAPHS         graphs of kernels: "refused" captures nothing, "other_bits" replays products with other bits
"""

import os
import types
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ops = torch.ops.aten
_WAIT = (_ops._local_scalar_dense.default, _ops.nonzero.default, _ops.masked_select.default, _ops.equal.default)
_PRODUCTS = (_ops.mm.default, _ops.addmm.default, _ops.bmm.default)


class _Recorder(TorchDispatchMode):
    """Record the operators on the device, and refuse those for which a process waits, as a capturing stream does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        places = {
            one.device.type for one in [*tensors, *tree_leaves(out)] if isinstance(one, torch.Tensor) and one.dim()
        }
        if (
            func in _WAIT
            or len(places) > 1
            or (func is _ops.index.Tensor and any(one.dtype == torch.bool for one in tensors[1:]))
        ):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """Stand-in for `torch.accelerator.Graph`: a replay calls the recorded operators again on the same tensors."""

    def __init__(self, *, pool: Any = None) -> None:
        self._recorder = _Recorder()
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def __enter__(self) -> None:
        if os.environ.get("SIM_GRAPHS") == "refused":
            raise RuntimeError("this device captures no graph")
        self._recorder.__enter__()
        _Sim.capturing = True

    def __exit__(self, *exc_info: object) -> None:
        _Sim.capturing = False
        self._recorder.__exit__(*exc_info)

    def replay(self) -> None:
        _Sim.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self._recorder.calls:
                again = func(*args, **kwargs)
                if os.environ.get("SIM_GRAPHS") == "other_bits" and func in _PRODUCTS:
                    again = again * (1 + 1e-3)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if (
                        isinstance(old, torch.Tensor)
                        and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                    ):
                        old.copy_(new)


class _Sim(types.ModuleType):
    replays = 0  # for all graphs
    capturing = False

    def device_count(self) -> int:
        return int(os.environ.get("SIM_DEVICES", "1"))

    def is_available(self) -> bool:
        return self.device_count() > 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def get_device_name(self, device: torch.device) -> str:
        return f"a simulated device {device.index or 0}"

    @cached_property
    def default_generators(self) -> tuple[torch.Generator, ...]:
        return tuple(torch.Generator(f"sim:{number}") for number in range(self.device_count()))

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = "sim") -> torch.Tensor:
        return self.default_generators[torch.device(device).index or 0].get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = "sim") -> None:
        self.default_generators[torch.device(device).index or 0].set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def counters(self) -> dict[str, int]:
        """Return the launches, synchronizations and copies since the last call, by operator."""
        found = dict(zip(*torch.ops.sim.counters(), strict=True))
        torch.ops.sim.reset_counters()
        return found


@cache
def load() -> None:
    """Register the device "sim" in this process, once."""
    torch.utils.rename_privateuse1_backend("sim")
    torch.ops.load_library(str(Path(__file__).with_name("sim.so")))
    torch._register_device_module("sim", _Sim("torch.sim"))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.accelerator.Graph = Graph  # type: ignore[misc, assignment]
    torch.cuda.is_current_stream_capturing = lambda: _Sim.capturing  # queried by transformers
    of_this_thread = torch.set_num_threads

    def set_num_threads(number: int) -> None:
        of_this_thread(number)
        torch.ops.sim.set_num_threads(number)

    torch.set_num_threads = set_num_threads
