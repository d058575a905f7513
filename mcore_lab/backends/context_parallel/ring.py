"""`p2p`: keys and values travel round the ranks, block by block.

Ring Attention, arXiv:2310.01889.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_lab.backends.context_parallel.blockwise import BackwardPass, ForwardPass
from mcore_lab.backends.context_parallel.zigzag import Documents, Tile

Pair = tuple[Tensor, Tensor]
"""Of keys and values, or of their gradients."""


class Passing:
    """A pair under way: this rank's to the next rank, the previous rank's to this one."""

    def __init__(self, tensors: Pair, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        following, previous = (
            dist.get_global_rank(group, (rank + step) % size) for step in (1, -1)
        )
        arriving_pair = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
        # Memory that is being sent has to stay as it is until it is sent.
        self._pairs = [tensors, arriving_pair]
        operations = []
        for sent, arriving in zip(*self._pairs, strict=True):
            operations.append(dist.P2POp(dist.isend, sent, following, group))
            operations.append(dist.P2POp(dist.irecv, arriving, previous, group))
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> Pair:
        """Wait for both ways; return what the previous rank sent."""
        for work in self._works:
            work.wait()
        self._works.clear()
        arrived = self._pairs.pop()
        self._pairs.clear()
        return arrived


def _add(total: Pair, share: Pair) -> None:
    for tensor, more in zip(total, share, strict=True):
        tensor += more


class Ring:
    """Each rank in turn holds each block of keys and values, and computes while the next arrives.

    A rank holds its own block, which the backward pass needs, and at most two of others: one that
    it computes with and one that arrives. The backward pass goes round once more; the gradients of
    a block travel with it, one step behind, and gather every rank's share until they are home.
    Without a group there is one rank.

    A block may be the tokens of `together` neighbouring ranks, which have traded heads.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        documents: Documents,
        *,
        causal: bool,
        together: int = 1,
    ) -> None:
        self._group, self._documents, self._causal = group, documents, causal
        self._rank, self._size = (group.rank(), group.size()) if group else (0, 1)
        self._together = together

    def forward(self, attention: ForwardPass, key: Tensor, value: Tensor) -> None:
        """Show each block to this rank's queries as it comes by."""
        block = key, value
        for step in range(self._size):
            passing = self._pass_on(block) if step < self._size - 1 else None
            attention.see(*block, self._tiles(step))
            if passing:
                block = passing.wait()

    def backward(self, attention: BackwardPass, key: Tensor, value: Tensor) -> Pair:
        """Show each block again, and send its gradients after it."""
        block = key, value
        grads: Passing | None = None
        for step in range(self._size):
            passing = self._pass_on(block) if step < self._size - 1 else None
            added = attention.see(*block, self._tiles(step))
            if grads:
                _add(added, grads.wait())
            grads = self._pass_on(added)
            if passing:
                block = passing.wait()
        return grads.wait() if grads else added

    def _tiles(self, step: int) -> list[Tile]:
        mine, theirs = (
            range(rank * self._together, (rank + 1) * self._together)
            for rank in (self._rank, (self._rank - step) % self._size)
        )
        return self._documents.tiles(mine, theirs, causal=self._causal)

    def _pass_on(self, tensors: Pair) -> Passing | None:
        return Passing(tensors, self._group) if self._group and self._size > 1 else None
