"""`p2p`: keys and values travel round the ranks, block by block (Ring Attention, arXiv:2310.01889)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_lab.backends.context_parallel.blockwise import BackwardPass, ForwardPass
from mcore_lab.backends.context_parallel.zigzag import Documents, Tile


class Passing:
    """Tensors under way: this rank's to the next rank, the previous rank's to this one."""

    def __init__(self, tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        following, previous = (
            dist.get_global_rank(group, (rank + step) % size) for step in (1, -1)
        )
        # Memory that is being sent from has to stay until it is sent.
        self._sent = tensors
        self._arriving = tuple(torch.empty_like(x) for x in tensors)
        operations = []
        for sent, arriving in zip(self._sent, self._arriving, strict=True):
            operations.append(dist.P2POp(dist.isend, sent, following, group))
            operations.append(dist.P2POp(dist.irecv, arriving, previous, group))
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for both ways; return what the previous rank sent."""
        for work in self._works:
            work.wait()
        self._sent = ()
        arrived, self._arriving = self._arriving, ()
        return arrived


class Ring:
    """Each rank in turn holds each block of keys and values, and computes while the next arrives.

    A rank holds its own block, which the backward pass needs, and at most two of others: one that
    it computes with and one that arrives. The backward pass goes round once more; the gradients of
    a block travel with it, one step behind, and gather every rank's share until they are home.
    Without a group there is one rank.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, documents: Documents, *, causal: bool
    ) -> None:
        self._group = group
        self._rank, self._size = (group.rank(), group.size()) if group else (0, 1)
        self._documents, self._causal = documents, causal

    def forward(self, attention: ForwardPass, key: Tensor, value: Tensor) -> None:
        """Show each block to this rank's queries as it comes by."""
        block: tuple[Tensor, ...] = (key, value)
        for step in range(self._size):
            passing = self._pass_on(block) if step < self._size - 1 else None
            attention.see(*block, self._tiles(step))
            if passing:
                block = passing.wait()

    def backward(
        self, attention: BackwardPass, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Show each block again, and send its gradients after it."""
        block: tuple[Tensor, ...] = (key, value)
        grads: Passing | None = None
        for step in range(self._size):
            passing = self._pass_on(block) if step < self._size - 1 else None
            added = attention.see(*block, self._tiles(step))
            if grads:
                for total, share in zip(added, grads.wait(), strict=True):
                    total += share
            grads = self._pass_on(added)
            if passing:
                block = passing.wait()
        grad_key, grad_value = grads.wait() if grads else added
        return grad_key, grad_value

    def _tiles(self, step: int) -> list[Tile]:
        source = (self._rank - step) % self._size
        return self._documents.tiles(
            rank=self._rank, source=source, size=self._size, causal=self._causal
        )

    def _pass_on(self, tensors: tuple[Tensor, ...]) -> Passing | None:
        return Passing(tensors, self._group) if self._group and self._size > 1 else None
