"""The models whose layouts are verified: as small as they may be and have what can go wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mcore_lab.config import Data, Model, Recipe, Training

_DENSE = Recipe(
    name="tp2_gpt",
    model=Model(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        transformer={
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            # About what keeps the size of activations of this width: with the default of 0.02
            # attention is nearly even, and an error in queries and keys is lost in the rest.
            "init_method_std": 0.15,
        },
    ),
    data=Data(sequence_length=16, micro_batch_size=1, global_batch_size=4, mock_document_length=12),
    training=Training(steps=2, lr=1e-2),
)
EXPERTS = {
    "add_bias_linear": False,
    "moe_grouped_gemm": True,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
_LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
}


def with_fields(transformer: dict[str, Any], **model: Any) -> Recipe:
    """Return the dense model with other fields of `TransformerConfig` and of its shape."""
    transformer = {**_DENSE.model.transformer, **transformer}
    return replace(_DENSE, model=replace(_DENSE.model, **model, transformer=transformer))


RECIPES = {
    "dense": _DENSE,
    "bf16": replace(_DENSE, training=replace(_DENSE.training, precision="bf16")),
    "moe": with_fields(EXPERTS, num_layers=2, num_moe_experts=4),
    "mla": with_fields(_LATENT, num_layers=2),
    "mtp": with_fields({"mtp_num_layers": 1}, num_layers=2),
}
