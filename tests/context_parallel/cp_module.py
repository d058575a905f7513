"""The core attention as Megatron-Core builds it: from a configuration, with its process groups."""

from __future__ import annotations

from typing import Any

import torch
from cp_cases import Case, cumulative

from mcore_lab import cpu

cpu.preload()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from mcore_lab.backends.context_parallel import TorchDotProductAttention  # noqa: E402


def core_attention(
    case: Case, cp: int, comm_type: str | None = None, **fields: Any
) -> TorchDotProductAttention:
    """Build the core attention of layer 3 for a case, with `fields` of the configuration."""
    config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": case.heads * case.channels,
            "kv_channels": case.channels,
            "num_attention_heads": case.heads,
            "num_query_groups": case.groups,
            "context_parallel_size": cp,
            "attention_dropout": 0.0,
            "bf16": case.dtype is torch.bfloat16,
            "masked_softmax_fusion": False,
        }
        | fields
    )
    return TorchDotProductAttention(
        config=config,
        layer_number=3,
        attn_mask_type=AttnMaskType.causal if case.causal else AttnMaskType.no_mask,
        attention_type="self",
        softmax_scale=case.scale,
        k_channels=case.channels,
        v_channels=case.value_channels,
        cp_comm_type=comm_type,
    )


def packed_params(case: Case) -> PackedSeqParams:
    """Describe a case's documents as `thd` does, padded ones by where they are stored as well."""
    real, stored = cumulative(case.lengths or case.stored), cumulative(case.stored)
    padded = stored if case.lengths else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(case.stored),
        max_seqlen_kv=max(case.stored),
    )
