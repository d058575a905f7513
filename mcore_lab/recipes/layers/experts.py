"""A mixture-of-experts layer over expert-parallel ranks: which tokens went to which expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_lab.config import Recipe
from mcore_lab.errors import ConfigError
from mcore_lab.recipes.layers.parts import (
    LayerReport,
    difference,
    hidden_states,
    join,
    one_layer,
    report,
    whole,
)
from mcore_lab.runtime import World


def show(recipe: Recipe, world: World) -> LayerReport:
    """Run the layer on tokens `[s, b, h]` of each rank's own, and count where they went."""
    join(recipe)
    layer = one_layer(recipe, world).mlp
    if not recipe.model.num_moe_experts or layer.config.gated_linear_unit or recipe.layout.tp > 1:
        raise ConfigError(
            f"{recipe.name} shows experts without a gated unit, on ranks that split no tokens: "
            "--tp 1"
        )
    tokens = hidden_states(recipe, seed=world.rank)
    with torch.no_grad():
        output, _ = layer(tokens)
        probs, chosen = layer.router(tokens)
        expected = _one_after_the_other(layer, tokens.flatten(0, 1), probs)

    sent = chosen.sum(0)
    received = sent.clone()
    dist.all_reduce(received, group=parallel_state.get_expert_model_parallel_group())
    held = layer.local_expert_indices
    row = {
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "experts": held,
        "own tokens": len(chosen),
        "sent to each expert": sent.tolist(),
        "tokens of each held expert": received[held].tolist(),
        "received in all": int(received[held].sum()),
        "output": difference(output.flatten(0, 1), expected),
    }
    topk = layer.config.moe_router_topk
    remark = (
        f"each token goes to {topk} experts; output: largest relative difference from all experts "
        "on one rank"
    )
    return report(recipe, row, remark)


def _one_after_the_other(layer: Any, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Apply every expert of the layer to every token, weighed as the router decided."""
    group = parallel_state.get_expert_model_parallel_group()
    first, second = (
        whole(_stacked(layer.experts, name), group, dim=0) for name in ("linear_fc1", "linear_fc2")
    )
    output = torch.zeros_like(tokens)
    for weight, widen, narrow in zip(probs.unbind(1), first, second, strict=True):
        output += weight[:, None] * (layer.config.activation_func(tokens @ widen.t()) @ narrow.t())
    return output


def _stacked(experts: Any, name: str) -> torch.Tensor:
    """Return one linear layer of the local experts as `[e, out, in]`, however they are kept."""
    if hasattr(experts, "local_experts"):
        return torch.stack([getattr(expert, name).weight for expert in experts.local_experts])
    return getattr(experts, name).weight
