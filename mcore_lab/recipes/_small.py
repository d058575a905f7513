"""The small models that the recipes share: twenty steps take seconds."""

from __future__ import annotations

from typing import Any

from mcore_lab.config import Data, Model, Training

NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
"""Layouts draw dropout differently: without it their losses can be compared."""

DATA = Data(
    sequence_length=64,
    micro_batch_size=1,
    global_batch_size=8,
    # Every rank shuffles all samples that the documents hold: a second for Megatron-Core's own.
    mock_document_length=256,
)
TRAINING = Training(steps=20, lr=2e-3)


def small_gpt(**changes: Any) -> Model:
    """Return a dense GPT of 0.9 million parameters; `transformer` adds to its fields."""
    transformer = NO_DROPOUT | dict(changes.pop("transformer", {}))
    shape = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 128}
    return Model(**(shape | changes), transformer=transformer)


def small_moe(**changes: Any) -> Model:
    """Return a GPT with four experts in each layer, of which each token goes to two."""
    experts = {
        "add_bias_linear": False,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        # Twenty steps need no balance; an auxiliary loss would only blur what is compared.
        "moe_router_load_balancing_type": "none",
    }
    transformer = experts | dict(changes.pop("transformer", {}))
    return small_gpt(num_moe_experts=4, **changes, transformer=transformer)
