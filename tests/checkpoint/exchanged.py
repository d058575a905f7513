"""Small Llamas and Mixtrals: as recipes, and what they make of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from small_runs import SMALL, changed

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.runtime import launch, model_parallel

LLAMA = changed(
    SMALL,
    model={
        "num_layers": 2,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "position_embedding_type": "rope",
        "rotary_base": 5000,
        "transformer": SMALL.model.transformer
        | {
            "normalization": "RMSNorm",
            "activation_func": "silu",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "layernorm_epsilon": 1e-3,
        },
    },
    # Norms that have been trained are told from one another.
    training={"steps": 2, "lr": 1e-2},
)
MIXTRAL = changed(
    LLAMA,
    model={
        "num_moe_experts": 4,
        "transformer": LLAMA.model.transformer
        | {
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": True,
        },
    },
)
TOKENS = [[5, 0, 64, 17, 33, 2, 9, 60, 41, 5, 5, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
SAME = {"rtol": 1e-5, "atol": 1e-5}
"""Logits are of order one; sums in fp32 come in another order."""


def with_fields(recipe: Recipe, **fields: object) -> Recipe:
    """Return the recipe with other fields of the transformer."""
    return changed(recipe, model={"transformer": recipe.model.transformer | fields})


def logits_of(checkpoint: Path, recipe: Recipe) -> torch.Tensor:
    """Return the logits `[batch, sequence, vocabulary]` of `TOKENS`, computed on one rank."""
    alone = replace(recipe, layout=ParallelLayout())
    return launch(_logits, 1, checkpoint, alone, timeout=60)[0]


@torch.no_grad()
def _logits(checkpoint: Path, recipe: Recipe) -> torch.Tensor:
    from mcore_lab.backends import choose_backend
    from mcore_lab.checkpoint.load import load_weights
    from mcore_lab.model import gpt_chunk, pipeline_stages, transformer_config

    with model_parallel(recipe.layout):
        config, backend = transformer_config(recipe), choose_backend("torch", "cpu")
        (stage,) = pipeline_stages(recipe.layout)
        model = gpt_chunk(recipe, config, stage, backend, 1).eval()
        model.ddp_config = SimpleNamespace(use_distributed_optimizer=False)
        optimizer = SimpleNamespace(reload_model_params=lambda: None)
        load_weights(checkpoint, [model], optimizer)
        tokens = torch.tensor(TOKENS)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
        logits: torch.Tensor = model(tokens, positions, mask)
    return logits
