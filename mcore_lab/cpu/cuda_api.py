"""`torch.cuda` and `torch.accelerator` as a program sees them on a machine that computes on CPU.

A CPU is a device whose work is done when the call returns: streams and events are in program order,
synchronising is no work, and memory is the process's. Nothing here pretends to a result: what only
a GPU can do, such as CUDA graphs, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from mcore_lab.cpu.memory import MEMORY
from mcore_lab.cpu.random_stream import STREAM
from mcore_lab.cpu.replace import replace
from mcore_lab.cpu.streams import Event, Stream, current_stream, default_stream, set_stream
from mcore_lab.errors import BackendError

_current_device = 0


class _DeviceContext:
    """`with torch.cuda.device(i)`: the device is the same one."""

    def __init__(self, device: object = None) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


class _CUDAGraph:
    """The type, for annotations; none can be made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise BackendError(
            "CUDA graphs need a GPU, and this run is on CPU; leave cuda_graph_impl at 'none'"
        )

    def register_generator_state(self, generator: torch.Generator) -> None:
        """That there is such a method says that random states can be shared."""


def _set_device(device: torch.device | int | str) -> None:
    global _current_device
    index = device if isinstance(device, int) else torch.device(device).index
    _current_device = max(index or 0, 0)


def _device_count() -> int:
    """Each rank of this machine counts as one device, as torchrun tells it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device_properties(device: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="CPU",
        major=0,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Work that a CPU has already done."""


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return STREAM.get_state()


def _set_rng_state(state: torch.Tensor, device: object = "cuda") -> None:
    STREAM.set_state(state)


def _set_rng_state_all(states: list[torch.Tensor]) -> None:
    STREAM.set_state(states[0])


def _run_now(callback: Callable[[], Any], **kwargs: Any) -> None:
    callback()


_CUDA: dict[str, Any] = MEMORY | {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "is_current_stream_capturing": lambda: False,
    "init": _nothing,
    "_lazy_init": _nothing,
    "_lazy_call": _run_now,
    "_is_in_bad_fork": lambda: False,
    "device": _DeviceContext,
    "device_of": _DeviceContext,
    "device_count": _device_count,
    "current_device": lambda: _current_device,
    "set_device": _set_device,
    "get_device_name": lambda device=None: "CPU",
    "get_device_capability": lambda device=None: (0, 0),
    "get_device_properties": _device_properties,
    "synchronize": _nothing,
    "Stream": Stream,
    "ExternalStream": Stream,
    "Event": Event,
    "set_stream": set_stream,
    "current_stream": current_stream,
    "default_stream": default_stream,
    "CUDAGraph": _CUDAGraph,
    "get_rng_state": _get_rng_state,
    "get_rng_state_all": lambda: [STREAM.get_state()],
    "set_rng_state": _set_rng_state,
    "set_rng_state_all": _set_rng_state_all,
    "manual_seed": STREAM.manual_seed,
    "manual_seed_all": STREAM.manual_seed,
    "seed": STREAM.seed,
    "seed_all": STREAM.seed,
    "initial_seed": STREAM.initial_seed,
}
_MODULES = (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams)
_ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: False,
    "device_count": lambda: 0,
    "current_accelerator": lambda check_available=False: None,
    "current_stream": current_stream,
    "synchronize": _nothing,
    "empty_cache": _nothing,
}


class _EveryDevice(tuple[Any, ...]):
    """`torch.cuda.default_generators`: each index is this process's one device."""

    def __getitem__(self, index: Any) -> Any:
        return STREAM


def install_cuda() -> None:
    """Put the table in the place of `torch.cuda`'s functions."""
    for name, value in _CUDA.items():
        for module in _MODULES:
            if hasattr(module, name):
                replace(module, name, value)
    torch.cuda._initialized = True
    replace(torch.cuda.nccl, "version", lambda: (0, 0, 0))
    torch.cuda.default_generators = _EveryDevice((STREAM,))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _nothing)
    torch.cuda.nvtx.range = lambda *args, **kwargs: nullcontext()  # type: ignore[assignment]


def install_accelerator() -> None:
    """Say that there is no accelerator, on a CUDA build of torch as on a CPU build."""
    for name, value in _ACCELERATOR.items():
        if hasattr(torch.accelerator, name):
            replace(torch.accelerator, name, value)
