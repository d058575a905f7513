"""`p2p`: keys and values travel round the ranks, block by block.

Ring Attention, arXiv:2310.01889.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_lab.backends.context_parallel.blockwise import BackwardPass, ForwardPass
from mcore_lab.backends.context_parallel.zigzag import Documents, Tile

Pair = tuple[Tensor, Tensor]
"""Of keys and values, or of their gradients."""


class Parcel:
    """Tensors side by side in one piece of memory, which is one message.

    None may have a wider type than one before it, which would not be aligned.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._forms = [(x.dtype, x.shape, x.nbytes) for x in tensors]
        self.memory = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in tensors])

    def tensors(self) -> tuple[Tensor, ...]:
        """Return them, as views of the memory."""
        parts = self.memory.split([nbytes for _, _, nbytes in self._forms])
        return tuple(
            part.view(dtype).view(shape)
            for part, (dtype, shape, _) in zip(parts, self._forms, strict=True)
        )

    def empty_like(self) -> Parcel:
        """Return another for the same tensors, in memory of its own that holds nothing yet."""
        other = copy(self)
        other.memory = torch.empty_like(self.memory)
        return other


class Passing:
    """A parcel under way: this rank's to the next rank, the previous rank's to this one."""

    def __init__(self, parcel: Parcel, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        following, previous = (
            dist.get_global_rank(group, (rank + step) % size) for step in (1, -1)
        )
        # Memory that is being sent has to stay as it is until it is sent.
        self._parcels = [parcel, parcel.empty_like()]
        leaving, arriving = (parcel.memory for parcel in self._parcels)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, following, group),
                dist.P2POp(dist.irecv, arriving, previous, group),
            ]
        )

    def wait(self) -> Parcel:
        """Wait for both ways; return what the previous rank sent."""
        for work in self._works:
            work.wait()
        self._works.clear()
        arrived = self._parcels.pop()
        self._parcels.clear()
        return arrived


def _taken_in(arrived: Parcel, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Add the first tensors of a parcel to as many gradients, and return the others."""
    tensors = arrived.tensors()
    for total, share in zip(grads, tensors, strict=False):
        total += share
    return tensors[len(grads) :]


class Ring:
    """Each rank in turn holds each block of keys and values, and computes while the next arrives.

    A rank holds its own block, which the backward pass needs, and at most two of others: one that
    it computes with and one that arrives. The backward pass goes round once more; the gradients of
    a block travel one step behind it, beside the next block, and gather every rank's share until
    they are home.
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
        if self._size == 1:
            attention.see(key, value, self._tiles(0))
            return
        block = Parcel(key, value)
        for step in range(self._size):
            key, value = block.tensors()
            passing = self._pass_on(block) if step < self._size - 1 else None
            attention.see(key, value, self._tiles(step))
            if passing:
                block = passing.wait()

    def backward(self, attention: BackwardPass, key: Tensor, value: Tensor) -> Pair:
        """Show each block again, and send its gradients after it, beside the next block."""
        if self._size == 1:
            return attention.see(key, value, self._tiles(0))
        grads: tuple[Tensor, ...] = ()
        for step in range(self._size):
            is_last = step == self._size - 1
            parcel = Parcel(*grads) if is_last else Parcel(*grads, key, value)
            if not is_last:
                key, value = parcel.tensors()[-2:]
            passing, sent = self._pass_on(parcel), len(grads)
            # What is in the parcel is a copy: what it was made of can go.
            del parcel, grads
            grads = attention.see(key, value, self._tiles(step))
            key, value = _taken_in(passing.wait(), grads[:sent]) or (key, value)
        key_grad, value_grad = self._pass_on(Parcel(*grads)).wait().tensors()
        return key_grad, value_grad

    def _tiles(self, step: int) -> list[Tile]:
        mine, theirs = (
            range(rank * self._together, (rank + 1) * self._together)
            for rank in (self._rank, (self._rank - step) % self._size)
        )
        return self._documents.tiles(mine, theirs, causal=self._causal)

    def _pass_on(self, parcel: Parcel) -> Passing:
        assert self._group is not None
        return Passing(parcel, self._group)
