"""Self-attention over a long sequence, split over context-parallel ranks: memory and result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from mcore_lab.backends.context_parallel import zigzag_places
from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes.layers.parts import (
    LayerReport,
    difference,
    hidden_states,
    join,
    one_layer,
    report,
)
from mcore_lab.runtime import World
from mcore_lab.runtime.memory import TensorMemory

_MIB = 2**20


def show(recipe: Recipe, world: World) -> LayerReport:
    """Run the layer forward and backward on this rank's `[s / cp, b, h]`, and on `[s, b, h]`.

    The whole sequence is rank 0's alone, and attended to block by block as well.
    """
    join(recipe)
    group = parallel_state.get_context_parallel_group()
    length = recipe.layout.padded(recipe.data.sequence_length)
    recipe = replace(recipe, data=replace(recipe.data, sequence_length=length))
    attention = one_layer(recipe, world).self_attention
    alone = one_layer(replace(recipe, layout=ParallelLayout()), world).self_attention
    alone.load_state_dict(attention.state_dict())
    everything = hidden_states(recipe)
    places = zigzag_places([length], group.rank(), group.size()).to(everything.device)
    part = everything.detach()[places].requires_grad_()

    output, gradient, memory = _step(attention, part)
    of_rank_0: list[Any] = [
        _step(alone, everything, _one_document(length)) if world.is_first else None
    ]
    dist.broadcast_object_list(of_rank_0)
    expected, of_all, of_one = of_rank_0[0]
    row = {
        "cp": group.rank(),
        "tokens": len(places),
        "peak MiB": round(memory / _MIB, 1),
        "one rank's MiB": round(of_one / _MIB, 1),
        "share": f"{memory / of_one:.1%}",
        "output": difference(output, expected[places]),
        "gradient": difference(gradient, of_all[places]),
    }
    remark = (
        "peak: bytes of the tensors of one step; output, gradient of the input: largest relative "
        "difference from one rank's"
    )
    return report(recipe, row, remark)


def _step(
    attention: torch.nn.Module, tokens: torch.Tensor, packed: PackedSeqParams | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the output of one step, the gradient of its input, and the bytes it held at most."""
    with TensorMemory() as memory:
        output, _ = attention(tokens, None, packed_seq_params=packed)
        output.square().sum().backward()
    assert tokens.grad is not None
    return output.detach(), tokens.grad, memory.peak


def _one_document(length: int) -> PackedSeqParams:
    """Describe a sequence as one packed document: then no matrix of scores is ever whole."""
    ends = torch.tensor([0, length], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )
