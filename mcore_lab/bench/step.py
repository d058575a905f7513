"""What a recipe's step costs beside the same model in a bare Megatron-Core loop."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils.data import DataLoader

from mcore_lab.backends import choose_backend
from mcore_lab.compat import slice_for_context_parallel_rank
from mcore_lab.config import Recipe
from mcore_lab.data.datasets import build_datasets
from mcore_lab.model import on_device, pipeline_stages, transformer_config
from mcore_lab.recipes.builder import recipe_chunk
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, World, process_group
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.recorder import Recorder

_WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Medians over all timed steps of rank 0, from the end of one step to the end of the next."""

    recipe: str
    steps: int
    """How many steps of each were timed."""
    recipe_seconds: float
    bare_seconds: float
    ratio: float
    """The recipe's by the bare loop's."""


def measure_on_rank(recipe: Recipe, rounds: int) -> StepTimes:
    """Time the recipe and the bare loop in turn, `rounds` times `recipe.training.steps` of each.

    Each round builds everything anew; its first two steps are not counted.
    """
    recipe = dataclasses.replace(
        recipe, checkpoint=dataclasses.replace(recipe.checkpoint, save=False)
    )
    times: dict[Any, list[float]] = {_recipe_loop: [], _bare_loop: []}
    with RankLog(int(os.environ.get("RANK", "0"))) as log, process_group() as world:
        for turn in range(rounds):
            order = list(times) if turn % 2 == 0 else list(times)[::-1]
            for loop in order:
                ends = loop(recipe, world, log)
                pairs = zip(ends[_WARM_UP:], ends[_WARM_UP + 1 :], strict=False)
                times[loop] += [after - before for before, after in pairs]
                parallel_state.destroy_model_parallel()
    of_recipe, bare = (statistics.median(seconds) for seconds in times.values())
    return StepTimes(
        recipe=recipe.name,
        steps=len(times[_bare_loop]),
        recipe_seconds=of_recipe,
        bare_seconds=bare,
        ratio=of_recipe / bare,
    )


class _TimedRecorder(Recorder):
    """Notes when each step has been recorded as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ends: list[float] = []

    def step(self, *args: Any, **kwargs: Any) -> None:
        super().step(*args, **kwargs)
        self.ends.append(time.perf_counter())


def _recipe_loop(recipe: Recipe, world: World, log: RankLog) -> list[float]:
    with (
        tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder,
        Console(speaks=False) as console,
    ):
        recorder = _TimedRecorder(
            RunFolder(Path(folder) / "run"), log, console, recipe_toml="", fresh=True
        )
        train(recipe, world, recorder)
        return recorder.ends


def _bare_loop(recipe: Recipe, world: World, log: RankLog) -> list[float]:
    """Train as a script of Megatron-Core's would: nothing is recorded, reduced or checked."""
    data, layout = recipe.data, recipe.layout
    parallel_state.initialize_model_parallel(**layout.model_parallel_sizes())
    torch.manual_seed(recipe.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)
    config = transformer_config(recipe)
    backend = choose_backend(recipe.model.backend, world.device.type)
    datasets = build_datasets(data)
    model: list[Any] = []
    for stage in pipeline_stages(layout):
        chunk = recipe_chunk(recipe, config, stage, backend, datasets.vocab_size)
        distributed = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=layout.use_distributed_optimizer
        )
        model.append(DistributedDataParallel(config, distributed, on_device(config, chunk)))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=recipe.training.lr,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.use_distributed_optimizer,
        ),
        model,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    forward_backward = get_forward_backward_func()
    batches = [iter(_endless(DataLoader(datasets.train, data.micro_batch_size))) for _ in model]
    replicas = parallel_state.get_data_parallel_world_size()
    ends = []
    for _ in range(recipe.training.steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=data.global_batch_size // (data.micro_batch_size * replicas),
            seq_length=data.sequence_length,
            micro_batch_size=data.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        ends.append(time.perf_counter())
    return ends


def _endless(loader: Any) -> Any:
    while True:
        yield from loader


def _forward_step(batches: Any, model: torch.nn.Module) -> Any:
    batch = slice_for_context_parallel_rank(next(batches))
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    return (losses * mask).sum(), mask.sum().int(), {}
