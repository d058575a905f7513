"""A feed-forward layer, split over tensor-parallel ranks, beside the whole of it on each rank."""

from __future__ import annotations

import torch
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
    """Run the layer forward and backward on `[s, b, h]`, and hold it to the whole layer."""
    join(recipe)
    mlp = one_layer(recipe, world).mlp
    if not hasattr(mlp, "linear_fc1") or mlp.config.gated_linear_unit:
        raise ConfigError(f"{recipe.name} shows a dense layer without a gated unit")
    group = parallel_state.get_tensor_model_parallel_group()

    def own(tokens: torch.Tensor) -> torch.Tensor:
        """Under sequence parallelism a rank gets and returns its part of the tokens."""
        return tokens.chunk(group.size())[group.rank()] if recipe.layout.sp else tokens

    tokens, same_tokens = hidden_states(recipe), hidden_states(recipe)
    output = mlp(own(tokens))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), tokens)

    first, second = mlp.linear_fc1, mlp.linear_fc2
    inner = same_tokens @ whole(first.weight, group).t()
    if first.bias is not None:
        inner = inner + whole(first.bias, group)
    expected = own(mlp.activation_func(inner) @ whole(second.weight, group).t())
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), same_tokens)

    row = {
        "tp": group.rank(),
        "linear_fc1.weight": list(first.weight.shape),
        "linear_fc2.weight": list(second.weight.shape),
        "parameters": sum(parameter.numel() for parameter in mlp.parameters()),
        "output": difference(output, expected),
        "gradient": difference(own(gradient), own(expected_gradient)),
    }
    remark = "output, gradient of the input: largest relative difference from the whole layer's"
    return report(recipe, row, remark)
