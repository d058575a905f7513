"""`torch.cuda` and `torch.accelerator` as they look to a program, on a machine that computes on CPU.

A CPU is a device whose work is done when the call returns: streams and events are in program order,
synchronising is no work, and memory is the process's. Nothing here pretends to a result.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from mcore_lab.cpu.random_stream import STREAM
from mcore_lab.cpu.replace import replace


class Stream:
    """A stream in program order: whatever was put on it has been done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", _current_device)
        self.cuda_stream = self.stream_id = 0

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event here: now."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """A CPU has one priority."""
        return (0, 0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class Event:
    """A point in program order, with its time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds from this event to `end_event`."""
        return (end_event._seconds - self._seconds) * 1e3


class _DeviceContext:
    """`with torch.cuda.device(i)`: the device is the same one."""

    def __init__(self, device: object = None) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_current_device = 0
_DEFAULT_STREAM = Stream.__new__(Stream)


def _set_device(device: torch.device | int | str) -> None:
    global _current_device
    index = device if isinstance(device, int) else torch.device(device).index
    _current_device = index or 0


def _device_count() -> int:
    """Each rank of this machine counts as one device, as torchrun tells it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def _stream_context(stream: Stream | None) -> Iterator[Stream | None]:
    yield stream


def _resident_bytes(device: object = None) -> int:
    return int(psutil.Process().memory_info().rss)


def _peak_resident_bytes(device: object = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_info(device: object = None) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _memory_stats(device: object = None) -> dict[str, int]:
    now, peak = _resident_bytes(), _peak_resident_bytes()
    stats: dict[str, int] = {"num_alloc_retries": 0, "num_ooms": 0, "allocation.all.current": 0}
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        stats |= {f"{kind}.all.current": now, f"{kind}.all.peak": peak, f"{kind}.all.freed": 0}
        stats[f"{kind}.all.allocated"] = now
    return stats


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


_CUDA: dict[str, Any] = {
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
    "ipc_collect": _nothing,
    "Stream": Stream,
    "ExternalStream": Stream,
    "Event": Event,
    "stream": _stream_context,
    "set_stream": _nothing,
    "current_stream": lambda device=None: _DEFAULT_STREAM,
    "default_stream": lambda device=None: _DEFAULT_STREAM,
    "empty_cache": _nothing,
    "memory_allocated": _resident_bytes,
    "memory_reserved": _resident_bytes,
    "max_memory_allocated": _peak_resident_bytes,
    "max_memory_reserved": _peak_resident_bytes,
    "mem_get_info": _memory_info,
    "memory_stats": _memory_stats,
    "reset_peak_memory_stats": _nothing,
    "reset_max_memory_allocated": _nothing,
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
_IN_RANDOM_MODULE = ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all")
_ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: False,
    "device_count": lambda: 0,
    "current_accelerator": lambda check_available=False: None,
    "current_stream": lambda device=None: _DEFAULT_STREAM,
    "synchronize": _nothing,
    "empty_cache": _nothing,
}


class _EveryDevice(tuple[Any, ...]):
    """`torch.cuda.default_generators`: each index is this process's one device."""

    def __getitem__(self, index: Any) -> Any:
        return STREAM


def install_cuda() -> None:
    """Put the table in the place of `torch.cuda`'s functions."""
    _DEFAULT_STREAM.__init__()  # type: ignore[misc]
    for name, value in _CUDA.items():
        replace(torch.cuda, name, value)
    for name in _IN_RANDOM_MODULE:
        replace(torch.cuda.random, name, _CUDA[name])
    torch.cuda.default_generators = _EveryDevice((STREAM,))  # type: ignore[assignment]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _nothing)
    torch.cuda.nvtx.range = lambda *args, **kwargs: nullcontext()  # type: ignore[assignment]


def install_accelerator() -> None:
    """Say that there is no accelerator, on a CUDA build of torch as on a CPU build."""
    for name, value in _ACCELERATOR.items():
        if hasattr(torch.accelerator, name):
            replace(torch.accelerator, name, value)
