"""What `torch.cuda` says of memory, on a CPU: the memory of this process and of this machine."""

from __future__ import annotations

import contextlib
import resource
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil


def _resident(device: object = None) -> int:
    return int(psutil.Process().memory_info().rss)


def _peak_resident(device: object = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak(device: object = None) -> None:
    # Linux lowers the peak of a process to what it holds now. Elsewhere the peak stays.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _free_and_total(device: object = None) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _stats(device: object = None) -> dict[str, int]:
    """Return the bytes held; what only CUDA's allocator counts is 0."""
    now, peak = _resident(), _peak_resident()
    stats: dict[str, int] = defaultdict(int, num_alloc_retries=0, num_ooms=0)
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        for pool in ("all", "large_pool"):
            stats |= {f"{kind}.{pool}.current": now, f"{kind}.{pool}.peak": peak}
            stats[f"{kind}.{pool}.allocated"] = now
    return stats


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A CPU has no caching allocator to empty, limit or trace."""


MEMORY: dict[str, Any] = {
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    "memory_allocated": _resident,
    "memory_reserved": _resident,
    "max_memory_allocated": _peak_resident,
    "max_memory_reserved": _peak_resident,
    "mem_get_info": _free_and_total,
    "memory_stats": _stats,
    "memory_snapshot": lambda *args, **kwargs: [],
    "reset_peak_memory_stats": _reset_peak,
    "reset_max_memory_allocated": _reset_peak,
    "reset_accumulated_memory_stats": _nothing,
    "set_per_process_memory_fraction": _nothing,
    "_record_memory_history": _nothing,
}
"""The functions of `torch.cuda.memory`, by name."""
