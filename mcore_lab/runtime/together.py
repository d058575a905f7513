"""What one rank alone finds to be wrong is raised on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mcore_lab.errors import LabError, LostPeerError


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise the LabError that any rank's body raises on every rank; without one, a barrier.

    The body is free to differ from rank to rank, and holds no collective: a rank that fails there
    would leave the others waiting for it.
    """
    error: LabError | None = None
    try:
        yield
    except LabError as raised:
        error = raised
    if not on_any_rank(error is not None):
        return
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for first in filter(None, [error, *errors]):
        raise first


def on_any_rank(flag: bool) -> bool:
    """Say whether the flag is set on a rank: one collective of a byte, where objects take two."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    on_any = torch.tensor(flag, dtype=torch.uint8, device=device)
    dist.all_reduce(on_any, op=dist.ReduceOp.MAX)
    return bool(on_any.item())


def lost_a_peer(error: BaseException) -> bool:
    """Say whether the error means that another rank has gone."""
    return isinstance(error, dist.DistError | LostPeerError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
