"""Copies of tensors, for a save to write while training changes what they are of."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Copies:
    """Copies whose memory is kept from one save to the next, which copies the same tensors.

    Most of the time that a copy takes is the kernel's, which finds and clears new memory for it.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def make(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of the tensors on the CPU; those that were returned before are lost."""
        before = iter(self._kept)
        self._kept = [_copy(tensor, next(before, None)) for tensor in tensors]
        return self._kept


def _copy(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    if memory is None or (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
        memory = torch.empty_like(tensor, device="cpu")
    return memory.copy_(tensor)
