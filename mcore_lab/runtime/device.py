"""Where ranks compute: a CUDA device each with NCCL, or the CPU with Gloo."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mcore_lab import cpu
from mcore_lab.errors import BackendError


@dataclass(frozen=True, kw_only=True)
class Device:
    """What this machine's ranks compute on, and why."""

    type: str
    """`cuda` or `cpu`."""
    communication: str
    """The process groups' backend: `nccl` or `gloo`."""
    reason: str
    """Why it was chosen, for a person."""


def choose_device(local_world_size: int, wanted: str = "auto") -> Device:
    """Choose CUDA and NCCL where each of this machine's ranks has a GPU, else CPU and Gloo.

    `wanted` is `auto`, `cpu` or `cuda`. Counts GPUs without starting CUDA, so that the process can
    still fork. Raises BackendError when CUDA is wanted and there are too few GPUs.
    """
    gpus = 0 if cpu.is_enabled() else torch.cuda.device_count()
    found = f"{gpus or 'no'} GPU{'' if gpus == 1 else 's'} for {local_world_size} rank"
    found += "" if local_world_size == 1 else "s"
    if wanted == "cuda" and gpus < local_world_size:
        raise BackendError(f"CUDA was asked for, but there are {found} on this machine")
    if wanted == "cpu":
        return Device(type="cpu", communication="gloo", reason="the CPU was asked for")
    if gpus >= local_world_size:
        return Device(type="cuda", communication="nccl", reason=found)
    return Device(type="cpu", communication="gloo", reason=found)


def threads_per_rank(local_world_size: int) -> int:
    """Return how many threads each rank gets when they share this machine's cores evenly."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
