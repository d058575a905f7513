"""Transformer Engine's layers in pure PyTorch, by the names that Megatron-Core and checkpoints use.

Megatron-Core's Transformer Engine specs are built of them where it is not installed: the same
constructors, parameter names and shards, without fp8 and what else its kernels alone can do. A
model in bf16 or fp32 that is written for those specs runs, and its checkpoints load, on both.
"""

from __future__ import annotations

from mcore_lab.backends.transformer_engine.activation import TEActivationOp
from mcore_lab.backends.transformer_engine.attention import TEDotProductAttention
from mcore_lab.backends.transformer_engine.grouped import (
    TEColumnParallelGroupedLinear,
    TEGroupedLinear,
    TERowParallelGroupedLinear,
)
from mcore_lab.backends.transformer_engine.linear import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELayerNormColumnParallelLinearGathered,
    TELinear,
    TERowParallelLinear,
)
from mcore_lab.backends.transformer_engine.norm import TENorm
from mcore_lab.backends.transformer_engine.refusals import TEFusedMLP, TEFusedMLPWithGroupedLinear

STAND_INS: dict[str, type] = {
    stand_in.__name__: stand_in
    for stand_in in (
        TEActivationOp,
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
        TEDotProductAttention,
        TEFusedMLP,
        TEFusedMLPWithGroupedLinear,
        TEGroupedLinear,
        TELayerNormColumnParallelLinear,
        TELayerNormColumnParallelLinearGathered,
        TELinear,
        TENorm,
        TERowParallelGroupedLinear,
        TERowParallelLinear,
    )
}
"""By the names that they have in `megatron.core.extensions.transformer_engine`."""
