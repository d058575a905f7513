"""The lesson's ring attention is Megatron-Core's, over ranks and on one, and zigzag shares work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_lab import cpu
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.lessons.ring_attention import RingAttention, Settings, lesson
from mcore_lab.lessons.sequence_chunks import Chunks
from mcore_lab.lessons.start import give
from mcore_lab.runtime import launch, model_parallel

cpu.preload()

from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from mcore_lab.backends.context_parallel import TorchDotProductAttention  # noqa: E402

LENGTH, BATCH, HEADS, CHANNELS = 64, 2, 4, 8
RANKS = 4
TOLERANCE = 1e-12
"""Relative, in float64, where sums in another order hide nothing."""


def core_attention(kind: type, causal: bool, cp: int) -> Any:
    """Return Megatron-Core's core attention, or what stands in its place with `cp` ranks."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        context_parallel_size=cp,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    of_ranks = {"cp_comm_type": "p2p"} if cp > 1 else {}
    attention = kind(config, 1, mask, "self", **of_ranks)

    def attend(*inputs: Tensor) -> Tensor:
        hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None] if causal else None
        output = attention(*inputs, None if cp > 1 else hidden, attn_mask_type=mask)
        return output.view(*output.shape[:2], HEADS, CHANNELS)

    return attend


def with_gradients(attend: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of query, key and value."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = attend(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def four_ranks() -> dict[str, list[Tensor]]:
    """Return what a rank computes of attention, causal and full, in all the ways there are."""
    found = {}
    shape = 4, LENGTH, BATCH, HEADS, CHANNELS
    draw = torch.Generator().manual_seed(7)
    *whole, grad = torch.randn(shape, generator=draw, dtype=torch.float64)
    with model_parallel(ParallelLayout(context_parallel_size=RANKS)) as world:
        for mask in ("causal", "full"):
            causal = mask == "causal"
            one_rank = with_gradients(core_attention(DotProductAttention, causal, 1), whole, grad)
            for order in ("zigzag", "contiguous"):
                zigzag = order == "zigzag"
                chunks = Chunks(rank=world.rank, size=RANKS, causal=causal, zigzag=zigzag)
                mine = [chunks.part(x) for x in whole], chunks.part(grad)
                found[f"{mask} {order}"] = with_gradients(
                    lambda *x, chunks=chunks: RingAttention.apply(*x, chunks, []), *mine
                )
                found[f"{mask} {order} one rank"] = [chunks.part(x) for x in one_rank]
            chunks = Chunks(rank=world.rank, size=RANKS, causal=causal)
            ours = core_attention(TorchDotProductAttention, causal, RANKS)
            mine = [chunks.part(x) for x in whole], chunks.part(grad)
            found[f"{mask} p2p"] = with_gradients(ours, *mine)
    return found


@pytest.fixture(scope="module")
def attention() -> list[dict[str, list[Tensor]]]:
    return launch(four_ranks, RANKS, timeout=60)


def off_by(ranks: list[dict[str, list[Tensor]]], ours: str, theirs: str) -> list[float]:
    """Return the largest difference of each of output, dq, dk, dv, relative to their largest."""
    pairs = [
        [torch.stack(of_ranks) for of_ranks in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in (ours, theirs)
    ]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*pairs, strict=True)]


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_output_and_gradients_are_those_of_megatron_cores_attention_on_one_rank(
    attention: list[dict[str, list[Tensor]]], mask: str, order: str
) -> None:
    assert max(off_by(attention, f"{mask} {order}", f"{mask} {order} one rank")) < TOLERANCE


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_output_and_gradients_are_those_of_the_context_parallel_core_attention(
    attention: list[dict[str, list[Tensor]]], mask: str
) -> None:
    assert max(off_by(attention, f"{mask} zigzag", f"{mask} p2p")) < TOLERANCE


def test_a_causal_mask_makes_a_difference(attention: list[dict[str, list[Tensor]]]) -> None:
    assert min(off_by(attention, "causal zigzag", "full zigzag")) > 0.1


# What the lesson shows.


def shown(ranks: int, **settings: Any) -> dict[str, Any]:
    """Return what the lesson finds on a short sequence."""
    small = Settings(**{"sequence_length": 64, "head_size": 8} | settings)
    found = launch(give, ranks, lesson, small, True, timeout=60, megatron_core=False)[0]
    assert found
    return found


def column(found: dict[str, Any], order: str, name: str) -> list[Any]:
    return [rank[name] for rank in found[order]["ranks"]]


@pytest.fixture(scope="module")
def of_four_ranks() -> dict[str, Any]:
    return shown(4)


def test_in_zigzag_order_all_ranks_work_alike_and_in_contiguous_order_the_last_works_longest(
    of_four_ranks: dict[str, Any],
) -> None:
    tile = 8 * 8
    step, first = 2 * tile, 3 * tile
    assert column(of_four_ranks, "zigzag", "chunks") == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert column(of_four_ranks, "zigzag", "scores by step") == [[first, step, step, step]] * 4
    assert column(of_four_ranks, "contiguous", "scores by step") == [
        [first, 0, 0, 0],
        [first, 2 * step, 0, 0],
        [first, 2 * step, 2 * step, 0],
        [first, 2 * step, 2 * step, 2 * step],
    ]
    assert of_four_ranks["zigzag"]["slowest"] == first + 3 * step
    assert of_four_ranks["contiguous"]["slowest"] == first + 3 * 2 * step


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_a_rank_of_four_holds_less_than_a_quarter_of_one_rank_s_memory(
    of_four_ranks: dict[str, Any], order: str
) -> None:
    ours, theirs = (column(of_four_ranks, order, name) for name in ("peak MiB", "one rank's MiB"))
    assert all(0 < held < whole / 4 for held, whole in zip(ours, theirs, strict=True))
    for name in ("output off by", "gradients off by"):
        assert max(column(of_four_ranks, order, name)) < 5e-6


def test_without_a_mask_both_orders_have_all_scores_and_one_rank_is_a_ring_too() -> None:
    full, alone = shown(3, sequence_length=24, causal=False), shown(1)
    for order in ("zigzag", "contiguous"):
        assert column(full, order, "scores by step") == [[8 * 8] * 3] * 3
        assert column(alone, order, "scores by step") == [[3 * 32 * 32]]
        for found in (full, alone):
            assert max(column(found, order, "gradients off by")) < 5e-6


def test_a_sequence_that_ranks_cannot_cut_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"6 chunks on 3 ranks cannot share .* 64 evenly; 66"):
        shown(3)
