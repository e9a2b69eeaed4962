"""The device "sim" of torch, see sim.cpp: torch loads this module by itself, by its entry point `torch.backends`.

Settings of its environment:
    SIM_DEVICES        how many there are (1)
    SIM_MEMORY_MIB     of each (16384)
    SIM_SDPA           attention: "fused" is the CPU's fused kernel; "by_rows" goes by the number of rows; "parted" has
                       other bits each time from 512 tokens on, unless torch is set to be deterministic
    SIM_NO_FLOAT64=1   no float64, as Apple's
    SIM_POISON=0       new memory is not filled with 0xCB
"""

import os
import types
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch


class _Sim(types.ModuleType):
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
    of_this_thread = torch.set_num_threads

    def set_num_threads(number: int) -> None:
        of_this_thread(number)
        torch.ops.sim.set_num_threads(number)

    torch.set_num_threads = set_num_threads
