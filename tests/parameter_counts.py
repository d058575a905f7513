"""What a rank holds of a model at scale, counted in Megatron-Core's own modules.

They are built on torch's fake process group, of as many ranks as the recipe is for, and of fake
tensors, which have shapes and no memory. Call this where `mcore_lab.cpu` is enabled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from fake_ranks import initialize, rank_of_world
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_lab.backends import Backend
from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.model import gpt_chunk, pipeline_stages, transformer_config

_TORCH = Backend(name="torch", reason="a test's")
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12
"""Bytes a parameter: bf16; fp32, in which gradients are reduced; fp32 weight and Adam's moments."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many parameters there are, of experts and of all else."""

    dense: int
    experts: int

    @property
    def all(self) -> int:
        """Both together."""
        return self.dense + self.experts

    def bytes_on(self, layout: ParallelLayout, world_size: int) -> float:
        """Return the bytes of weights, gradients and the distributed optimizer's share of state.

        Dense parameters have a copy on each data- and context-parallel rank, experts on each
        expert-data-parallel rank; the optimizer's state is shared among the copies.
        """
        copies = layout.data_parallel_size(world_size) * layout.cp
        of_experts = layout.expert_data_parallel_size(world_size)
        state = self.dense / copies + self.experts / of_experts
        return (_WEIGHT + _GRADIENT) * self.all + _OPTIMIZER * state


def of_the_fullest_rank(recipe: Recipe, world_size: int) -> Parameters:
    """Return what the fullest rank holds, of the first, the middle and the last stage."""
    stages = sorted({0, recipe.layout.pp // 2, recipe.layout.pp - 1})
    held = (_counted(*_chunks(recipe, world_size, stage)) for stage in stages)
    return max(held, key=lambda parameters: parameters.all)


def of_the_model(recipe: Recipe) -> Parameters:
    """Return the parameters of the whole model: one layer of each kind is built, on one rank."""
    number, frequency = recipe.model.num_layers, recipe.model.transformer.get("moe_layer_freq", 1)
    kinds = Counter(frequency if isinstance(frequency, (list, tuple)) else [frequency] * number)
    fields = {
        **recipe.model.transformer,
        "moe_layer_freq": list(kinds) if len(kinds) > 1 else frequency,
        "pipeline_model_parallel_layout": None,
    }
    model = replace(recipe.model, num_layers=len(kinds), transformer=fields)
    (built,) = _chunks(replace(recipe, layout=ParallelLayout(), model=model), 1, stage=0)
    layers = zip(built.decoder.layers, kinds.values(), strict=True)
    more = [(_counted(layer), number - 1) for layer, number in layers]
    once = _counted(built)
    return Parameters(
        dense=once.dense + sum(layer.dense * n for layer, n in more),
        experts=once.experts + sum(layer.experts * n for layer, n in more),
    )


def _chunks(recipe: Recipe, world_size: int, stage: int) -> list[Any]:
    """Return what a rank of a pipeline stage holds."""
    fields = {**recipe.model.transformer, "perform_initialization": False}
    recipe = replace(recipe, model=replace(recipe.model, transformer=fields))
    rows = recipe.model.vocab_size
    assert rows is not None
    with rank_of_world(recipe.layout.rank_of(world_size=world_size, pp=stage), world_size):
        initialize(recipe.layout)
        config, places = transformer_config(recipe), pipeline_stages(recipe.layout)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return [gpt_chunk(recipe, config, place, _TORCH, rows) for place in places]


def _counted(*modules: torch.nn.Module) -> Parameters:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    experts = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    return Parameters(dense=sum(p.numel() for p in parameters) - experts, experts=experts)
