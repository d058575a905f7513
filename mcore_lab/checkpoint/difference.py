"""How far two checkpoints are apart, whatever layouts they were saved from: tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mcore_lab.checkpoint.contents import Tensor, tensors_of
from mcore_lab.checkpoint.read import read


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """How a tensor of one checkpoint differs from that of another."""

    name: str
    largest: float | None
    """Largest absolute difference of two numbers; None where the tensors cannot be compared."""
    relative: float | None
    """That, as a share of the largest absolute number of either."""
    remark: str = ""
    """Why they cannot be compared."""

    @property
    def differs(self) -> bool:
        """Whether there is any difference at all."""
        return self.largest != 0


def compared(one: Path, other: Path) -> Iterator[TensorDifference]:
    """Return how each tensor of `one` and `other` differs; two tensors at a time are in memory."""
    ours, theirs = tensors_of(one), tensors_of(other)
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        remark = _remark(ours.get(name), theirs.get(name))
        if remark:
            yield TensorDifference(name=name, largest=None, relative=None, remark=remark)
        else:
            yield _difference(name, read(one, ours[name]), read(other, theirs[name]))


def _remark(ours: Tensor | None, theirs: Tensor | None) -> str:
    if ours is None or theirs is None:
        return f"only in {'B' if ours is None else 'A'}"
    return "" if ours.shape == theirs.shape else f"{ours.shape} in A, {theirs.shape} in B"


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> TensorDifference:
    if ours.numel() == 0:
        return TensorDifference(name=name, largest=0.0, relative=0.0)
    ours, theirs = ours.double(), theirs.double()
    apart = (ours - theirs).abs()
    # Both infinite, or both no number, are the same.
    apart[(ours == theirs) | (ours.isnan() & theirs.isnan())] = 0
    largest = apart.max().item()
    scale = max(ours.abs().max().item(), theirs.abs().max().item())
    return TensorDifference(name=name, largest=largest, relative=largest / scale if scale else 0.0)
