"""The parts of a look at one layer, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel

from mcore_lab.backends import choose_backend, decoder_block_spec
from mcore_lab.config import Recipe
from mcore_lab.errors import ConfigError
from mcore_lab.model import gpt_arguments, on_device, refusals_explained, transformer_config
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What a layer-level recipe shows."""

    recipe: str
    ranks: list[dict[str, Any]]
    """A row for each rank, by the names of its columns."""
    remark: str
    """What the rows say, in a line."""


def join(recipe: Recipe) -> None:
    """Build the layout's process groups, and seed the ranks."""
    if recipe.layout.pp > 1:
        raise ConfigError(f"{recipe.name} shows a single layer, which no pipeline splits: --pp 1")
    parallel_state.initialize_model_parallel(**recipe.layout.model_parallel_sizes())
    torch.manual_seed(recipe.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)


def one_layer(recipe: Recipe, world: World) -> Any:
    """Return this rank's part of the first `TransformerLayer` of the recipe's GPT."""
    config = transformer_config(recipe)
    backend = choose_backend(recipe.model.backend, world.device.type)
    with refusals_explained():
        model: Any = GPTModel(
            config,
            decoder_block_spec(config, backend, causal=recipe.model.causal_attention),
            **gpt_arguments(recipe, 1),
        )
    on_device(config, model)
    return model.decoder.layers[0]


def hidden_states(recipe: Recipe, seed: int = 0) -> torch.Tensor:
    """Return random activations `[s, b, h]`, the same on each rank that has the same seed."""
    shape = (recipe.data.sequence_length, recipe.data.micro_batch_size, recipe.model.hidden_size)
    draw = torch.Generator().manual_seed(recipe.training.seed + seed)
    device = torch.cuda.current_device()
    return torch.randn(shape, generator=draw).to(device).requires_grad_()


def whole(weight: Any, group: dist.ProcessGroup, dim: int | None = None) -> torch.Tensor:
    """Return a weight of which each rank of `group` holds a part, whole, without a gradient.

    `dim` is where it is split, Megatron-Core's own mark (`partition_dim`) if not given.
    """
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    dist.all_gather(parts, weight.detach().contiguous(), group=group)
    return torch.cat(parts, weight.partition_dim if dim is None else dim)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest number in `other`."""
    return float((one.detach() - other.detach()).abs().max() / other.detach().abs().max())


def report(recipe: Recipe, row: dict[str, Any], remark: str) -> LayerReport:
    """Gather every rank's row into what is shown."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, {"rank": dist.get_rank()} | row)
    return LayerReport(recipe=recipe.name, ranks=rows, remark=remark)
