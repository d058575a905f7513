"""`all_gather`: each rank gathers the keys and values of all (Llama 3, arXiv:2407.21783, 3.3.2)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mcore_lab.backends.context_parallel.blockwise import BackwardPass, ForwardPass
from mcore_lab.backends.context_parallel.zigzag import Documents, Tile


class AllGather:
    """Two collectives a pass and nothing to hide them behind: it suits few keys and many queries.

    The backward pass gathers again instead of keeping what was gathered, and reduce-scatters the
    gradients.
    """

    def __init__(self, group: dist.ProcessGroup, documents: Documents, *, causal: bool) -> None:
        self._group, self._documents, self._causal = group, documents, causal

    def forward(self, attention: ForwardPass, key: Tensor, value: Tensor) -> None:
        """Show all ranks' keys and values, in the order of the ranks, to this rank's queries."""
        attention.see(self._gather(key), self._gather(value), self._tiles())

    def backward(
        self, attention: BackwardPass, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Show them again; return the sum of all ranks' gradients for this rank's."""
        grad_key, grad_value = attention.see(self._gather(key), self._gather(value), self._tiles())
        return self._reduce_scatter(grad_key), self._reduce_scatter(grad_value)

    def _tiles(self) -> list[Tile]:
        everyone = range(self._group.size())
        return self._documents.tiles([self._group.rank()], everyone, causal=self._causal)

    def _gather(self, local: Tensor) -> Tensor:
        gathered = local.new_empty(self._group.size() * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local, group=self._group)
        return gathered

    def _reduce_scatter(self, gathered: Tensor) -> Tensor:
        local = gathered.new_empty(len(gathered) // self._group.size(), *gathered.shape[1:])
        dist.reduce_scatter_tensor(local, gathered, group=self._group)
        return local
