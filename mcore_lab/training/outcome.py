"""What all ranks learn of a step, in one all-reduce, before its gradients are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from mcore_lab.training.forward import Reports, loss_and_tokens


class StepOutcome(NamedTuple):
    """The same on every rank."""

    loss: float
    """Mean over the global batch's tokens, in nats."""
    is_finite: bool
    """Whether the loss and every gradient of every rank are."""
    must_stop: bool
    """Whether any rank was told to stop."""
    all_written: bool
    """Whether every rank has written its part of the checkpoint that is on its way."""


def step_outcome(
    reports: Reports,
    model: Sequence[DistributedDataParallel],
    *,
    stop_asked: bool,
    is_writing: bool,
) -> StepOutcome:
    """Return the outcome of a step whose gradients are reduced and not yet clipped."""
    device = torch.cuda.current_device()
    flags = torch.tensor([stop_asked, is_writing], dtype=torch.float32, device=device)
    not_finite = (~_sum_of_gradients(model, device).isfinite()).float().reshape(1)
    # Nothing is read from the device before all of it is together.
    of_all = torch.cat([loss_and_tokens(reports), not_finite, flags])
    dist.all_reduce(of_all)
    loss_sum, tokens, not_finite_on, stop_asked_on, writing_on = of_all.tolist()
    loss = loss_sum / max(tokens, 1)
    return StepOutcome(
        loss=loss,
        is_finite=not_finite_on == 0 and loss - loss == 0,
        must_stop=stop_asked_on > 0,
        all_written=writing_on == 0,
    )


def _sum_of_gradients(
    model: Sequence[DistributedDataParallel], device: torch.device | int
) -> torch.Tensor:
    """Return the sum of all gradients of this rank: it is finite if each of them is."""
    buffers = [
        buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    total = torch.zeros((), device=device)
    for buffer in buffers:
        total = total + buffer.grad_data.sum(dtype=torch.float32)
    return total
