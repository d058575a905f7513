"""A checkpoint's model on the ranks of a layout, asked for the logits of the next token.

Each token is a forward pass of all that stand before it, through the same schedule as training.
Megatron-Core's inference engines keep keys and values, and cost less a token, but not for
everything that is trained here: the engines of 0.16 and 0.19 bring up CUDA graphs, no context of
theirs holds what context-parallel ranks share, and none has interleaved stages. A wrong cache would
also be one more thing that could differ between layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_lab.backends import choose_backend
from mcore_lab.checkpoint.load import load_weights
from mcore_lab.config import Recipe
from mcore_lab.data.sequences import Batch, padded_share
from mcore_lab.layout import ParallelLayout
from mcore_lab.model import (
    BuildChunk,
    on_device,
    pipeline_stages,
    refusals_explained,
    transformer_config,
)
from mcore_lab.recipes.builder import recipe_chunk
from mcore_lab.runtime import World
from mcore_lab.runtime.wrappers import unwrapped

LogitsOf = Callable[..., torch.Tensor]


class Decoder:
    """This rank's part of a model that goes on with a sequence."""

    def __init__(
        self, recipe: Recipe, world: World, checkpoint: Path, build: BuildChunk = recipe_chunk
    ) -> None:
        """Join the layout's groups, build the model and load its weights; every rank does.

        Raises ConfigError for what Megatron-Core refuses, and CheckpointError, on every rank, for a
        checkpoint that is damaged, not to be trusted or of another model.
        """
        layout = self._layout = recipe.layout
        parallel_state.initialize_model_parallel(**layout.model_parallel_sizes())
        torch.manual_seed(recipe.training.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)
        config = transformer_config(recipe)
        backend = choose_backend(recipe.model.backend, world.device.type)
        with refusals_explained():
            chunks = [build(recipe, config, stage, backend, 1) for stage in pipeline_stages(layout)]
        self._chunks = [on_device(config, chunk).eval() for chunk in chunks]
        load_weights(checkpoint, self._chunks, verify=recipe.checkpoint.verify == "on")
        # Multi-token prediction is a loss of its own: the next token does without.
        config.mtp_num_layers = None
        for chunk in self._chunks:
            unwrapped(chunk).mtp_process = False
        self._step = get_forward_backward_func()
        self._num_microbatches = num_microbatches(recipe, layout)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Return the logits `[v]` of the token after `tokens`, on the last pipeline stage's ranks.

        Every rank calls this, with the same tokens.
        """
        sequence = torch.tensor([list(tokens)], device=torch.cuda.current_device())
        last = torch.zeros_like(sequence)
        last[0, -1] = 1
        positions = torch.arange(len(tokens), device=sequence.device).unsqueeze(0)
        whole = {"tokens": sequence, "position_ids": positions, "loss_mask": last}
        batch = padded_share(whole, self._layout)
        found: list[torch.Tensor] = self._step(
            forward_step_func=_forward_step,
            data_iterator=[repeat(batch) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=self._num_microbatches,
            seq_length=self._layout.padded(len(tokens)),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return found[0] if found else None


def num_microbatches(recipe: Recipe, layout: ParallelLayout) -> int:
    """Return how often a sequence goes through: once, but for interleaved stages, which take turns.

    They need as many micro-batches as there are stages, or as the recipe says.
    """
    group = recipe.model.transformer.get("microbatch_group_size_per_vp_stage")
    return max(group or 1, layout.pp) if layout.vpp > 1 else 1


def _forward_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, LogitsOf]:
    """Take a sequence through this rank's chunk: `[s, b, h]`, or logits `[b, s / cp, v / tp]`."""
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None)
    return output, partial(_last_logits, batch["loss_mask"].bool())


def _last_logits(is_last: torch.Tensor, logits: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return the logits `[v]` at the last place, which one context-parallel rank has."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    own = logits.float().masked_fill(~is_last.unsqueeze(-1), 0).sum(dim=(0, 1))
    dist.all_reduce(own, group=parallel_state.get_context_parallel_group())
    return own
