"""Ring attention: a sequence split over ranks, whose keys and values travel round them.

Why: attention compares every token with every other, so the scores of a long sequence fit on no
rank. Here a rank keeps its queries, and is shown the keys and values of one rank after the other:
it sends the block that it has to the next rank while it computes with it. What it gets of each
block is a softmax over a part of the keys. Two such parts are merged with the log-sum-exp of their
scores, exactly. The backward pass goes round once more and computes each block's scores anew from
the log-sum-exp; the gradients of keys and values travel behind them, and each rank adds its share.

Under a causal mask later tokens have more keys to look at. If rank r of n held the r-th part of the
sequence, the last rank would work longest, and the others would wait for it. So the sequence is cut
into 2n chunks, of which rank r holds chunks r and 2n - 1 - r (zigzag): all have the same work.

What to look at: output and gradients, which are those of whole attention on one rank; the memory of
a rank; and the scores that each rank computes in zigzag order beside those in contiguous order.
Source: Liu et al., arXiv:2310.01889; the merging, Dao et al., arXiv:2205.14135 (FlashAttention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_lab.lessons import ranks
from mcore_lab.lessons.sequence_chunks import Chunks
from mcore_lab.lessons.start import main
from mcore_lab.runtime import World
from mcore_lab.runtime.memory import TensorMemory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    sequence_length: int = 1024
    """Tokens of all ranks together."""
    batch_size: int = 1
    """Sequences."""
    num_heads: int = 4
    """Attention heads."""
    head_size: int = 32
    """Channels of each head."""
    causal: bool = True
    """Whether a token sees only itself and those before it."""
    seed: int = 42
    """Decides queries, keys and values."""


class Passing:
    """A block on its way: this rank's to the next rank, the previous rank's to this one."""

    def __init__(self, block: Tensor) -> None:
        """Start both; what leaves stays as it is until it has arrived."""
        self._leaving, self._arriving = block, torch.empty_like(block)
        rank, size = dist.get_rank(), dist.get_world_size()
        send = dist.P2POp(dist.isend, self._leaving, (rank + 1) % size)
        receive = dist.P2POp(dist.irecv, self._arriving, (rank - 1) % size)
        # In one batch: NCCL takes one after the other, and all ranks would send and none receive.
        self._works = dist.batch_isend_irecv([send, receive])

    def arrived(self) -> Tensor:
        """Wait for both ways; return what the previous rank sent."""
        for work in self._works:
            work.wait()
        return self._arriving


class RingAttention(torch.autograd.Function):
    """Attention `[s / n, b, h, d]` of this rank's queries to the keys and values of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, work: list[int]
    ) -> Tensor:
        """Show each block to the queries as it comes by, and merge what they make of it.

        How many scores of a head that takes is added to `work`, a number a step.
        """
        output, lse = torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf)
        block = torch.stack([key, value])
        for step in range(chunks.size):
            passing = Passing(block) if step < chunks.size - 1 else None
            work.append(0)
            for queries, keys, is_own in chunks.tiles(step, len(query)):
                scores = scores_of(query[queries], block[0, keys], causal=is_own)
                work[step] += scores.size(0) * scores.size(-1)
                part_lse = scores.logsumexp(-1)
                weights = (scores - part_lse.unsqueeze(-1)).exp()
                part = torch.einsum("qbhk,kbhd->qbhd", weights, block[1, keys])
                # Each part by its share of the sum of all exponentials.
                total = torch.logaddexp(lse[queries], part_lse)
                output[queries] *= (lse[queries] - total).exp().unsqueeze(-1)
                output[queries] += part * (part_lse - total).exp().unsqueeze(-1)
                lse[queries] = total
            block = passing.arrived() if passing else block
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.chunks = chunks
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Go round again; the gradients of a block travel a step behind it, and end at home."""
        (grad_output,), (query, key, value, output, lse) = grad_outputs, ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        block, gathering = torch.stack([key, value]), None
        grad_query = torch.zeros_like(query)
        # Softmax's backward: a score gains what its weight gains above the mean of all weights.
        mean = (grad_output * output).sum(-1, keepdim=True)
        for step in range(chunks.size):
            passing = Passing(block) if step < chunks.size - 1 else None
            share = torch.zeros_like(block)
            for queries, keys, is_own in chunks.tiles(step, len(query)):
                scores = scores_of(query[queries], block[0, keys], causal=is_own)
                weights = (scores - lse[queries].unsqueeze(-1)).exp()
                grad = grad_output[queries]
                grad_weights = torch.einsum("qbhd,kbhd->qbhk", grad, block[1, keys])
                grad_scores = weights * (grad_weights - mean[queries]) * query.size(-1) ** -0.5
                grad_query[queries] += torch.einsum("qbhk,kbhd->qbhd", grad_scores, block[0, keys])
                share[0, keys] += torch.einsum("qbhk,qbhd->kbhd", grad_scores, query[queries])
                share[1, keys] += torch.einsum("qbhk,qbhd->kbhd", weights, grad)
            share += gathering.arrived() if gathering else 0
            gathering = Passing(share) if chunks.size > 1 else None
            block = passing.arrived() if passing else block
        grad_key, grad_value = gathering.arrived() if gathering else share
        return grad_query, grad_key, grad_value, None, None


def scores_of(query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
    """Return the scores `[q, b, h, k]` of queries `[q, b, h, d]` and keys `[k, b, h, d]`."""
    scores = torch.einsum("qbhd,kbhd->qbhk", query, key) * query.size(-1) ** -0.5
    if causal:
        later = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).triu(1)
        scores.masked_fill_(later[:, None, None], -torch.inf)
    return scores


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Attend over the ring in both orders, and over the whole sequence on each rank."""
    cut = 2 * world.size
    ranks.require_shared(settings, "sequence_length", cut, f"{cut} chunks on {world.size} ranks")
    draw = torch.Generator().manual_seed(settings.seed)
    shape = 4, settings.sequence_length, settings.batch_size, settings.num_heads, settings.head_size
    query, key, value, grad = torch.randn(shape, generator=draw).to(world.device.type)
    with TensorMemory() as of_one_rank:
        whole = [x.clone().requires_grad_() for x in (query, key, value)]
        weights = scores_of(*whole[:2], causal=settings.causal).softmax(-1)
        expected = torch.einsum("qbhk,kbhd->qbhd", weights, whole[2])
        gradients = torch.autograd.grad(expected, whole, grad)

    found: dict[str, Any] = {}
    for order in ("zigzag", "contiguous"):
        zigzag, work = order == "zigzag", list[int]()
        chunks = Chunks(rank=world.rank, size=world.size, causal=settings.causal, zigzag=zigzag)
        with TensorMemory() as of_ring:
            inputs = [chunks.part(x).requires_grad_() for x in (query, key, value)]
            output = RingAttention.apply(*inputs, chunks, work)
            grads = torch.autograd.grad(output, inputs, chunks.part(grad))
        row = {
            "rank": world.rank,
            "chunks": chunks.of(world.rank),
            "scores by step": work,
            "peak MiB": of_ring.peak / 2**20,
            "one rank's MiB": of_one_rank.peak / 2**20,
            "output off by": ranks.largest_difference([output], [chunks.part(expected)]),
            "gradients off by": ranks.largest_difference(grads, map(chunks.part, gradients)),
        }
        rows = ranks.rows_of_all(row)
        slowest = sum(map(max, zip(*(row["scores by step"] for row in rows), strict=True)))
        found[order] = {"ranks": rows, "slowest": slowest}
        if world.is_first:
            print(f"{order}: step by step the slowest rank computes {slowest:,} scores a head.\n")
            ranks.print_rows(rows)
            print()
    return found


if __name__ == "__main__":
    main(Settings, lesson)
