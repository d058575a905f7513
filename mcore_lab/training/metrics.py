"""What a step is measured by: a line in `metrics.jsonl` each."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass

from mcore_lab.training.expert_balance import Load


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, as measured on rank 0."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the global batch's tokens, in nats."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    """Learning rate that the step was taken with."""
    step_seconds: float
    """Wall time of the step."""
    tokens_per_second: float
    """Tokens of the global batch by wall time."""
    peak_memory_bytes: int
    """Most memory so far: of tensors on a GPU, of rank 0's process on CPU."""
    mtp_loss: float | None = None
    """Mean over the multi-token prediction layers of their losses, in nats; None without any."""
    tflops_per_rank: float | None = None
    """TFLOP/s of a rank, on CUDA of a GPU, as `mcore_lab.training.flops` counts them; None of a
    model that it has no formula for."""
    mfu: float | None = None
    """Model FLOPs utilization: of its device's peak, that share; None if either is not known."""
    expert_imbalance: float | None = None
    """The most loaded expert's tokens by the mean of its layer's experts, in the layer where that
    is greatest: 1 at best, the number of experts at worst. None without experts."""
    tokens_per_expert: Load | None = None
    """Tokens of the global batch that each expert was given, by layer; None without experts."""
    seconds_by_phase: Mapping[str, float] | None = None
    """Where rank 0 spent the step: see `mcore_lab.training.phases`."""


def peak_memory_bytes(device_type: str) -> int:
    """Return the most memory this rank has used so far."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
