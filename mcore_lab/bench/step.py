"""What a recipe's step costs beside the same model in a bare Megatron-Core loop, and without it.

All loops start from the same weights and take the same samples. Their losses are compared: what
computes something else is not as fast, or as slow, for what it computes.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from mcore_lab.bench.peers import Trained, why_none
from mcore_lab.bench.peers.from_scratch import train_from_scratch
from mcore_lab.bench.peers.plain_torch import train_plain_torch
from mcore_lab.bench.peers.weights import weights_of
from mcore_lab.compat import slice_for_context_parallel_rank
from mcore_lab.config import Recipe
from mcore_lab.data.batches import global_batches
from mcore_lab.data.datasets import Datasets, build_datasets
from mcore_lab.errors import LabError
from mcore_lab.model import on_device, pipeline_stages, transformer_config
from mcore_lab.recipes.builder import recipe_chunk
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, World, process_group
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.recorder import Recorder

RECIPE, BARE = "recipe", "bare Megatron-Core"
SAME_LOSS = 1e-4
"""Relative: how far the losses of two loops may be apart, in fp32. Sums in another order move them
by some 1e-7, and Adam makes more of it with every step."""
_WARM_UP = 2

_Loop = Callable[[Recipe, World, RankLog], Trained]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Medians over all timed steps of rank 0, from the end of one step to the end of the next."""

    recipe: str
    steps: int
    """How many steps of each were timed."""
    seconds: dict[str, float]
    """Of a step in each loop; the first is the recipe's."""
    ratios: dict[str, float]
    """The recipe's by each other loop's."""
    loss: float
    """The recipe's, in the last step."""
    losses_apart: dict[str, float]
    """How far each other loop's losses are from the recipe's at most, relative."""
    no_peers: str | None
    """Why there is no loop without Megatron-Core, if there is none."""


def measure_on_rank(recipe: Recipe, rounds: int) -> StepTimes:
    """Time the loops in turn, `rounds` times `recipe.training.steps` of each.

    Each round builds everything anew; its first two steps are not counted. Raises LabError if the
    losses of two loops are not the same.
    """
    recipe = dataclasses.replace(
        recipe, checkpoint=dataclasses.replace(recipe.checkpoint, save=False)
    )
    with RankLog(int(os.environ.get("RANK", "0"))) as log, process_group() as world:
        no_peers = why_none(recipe, world.size)
        loops: dict[str, _Loop] = {RECIPE: _recipe_loop, BARE: _bare_loop}
        if not no_peers:
            loops |= {name: partial(_peer_loop, train) for name, train in PEERS.items()}
        times: dict[str, list[float]] = {name: [] for name in loops}
        losses: dict[str, list[float]] = {}
        for turn in range(rounds):
            for name in list(loops) if turn % 2 == 0 else list(loops)[::-1]:
                trained = loops[name](recipe, world, log)
                pairs = zip(trained.ends[_WARM_UP:], trained.ends[_WARM_UP + 1 :], strict=False)
                times[name] += [after - before for before, after in pairs]
                losses[name] = trained.losses
                parallel_state.destroy_model_parallel()
    ours, *others = losses
    apart = {name: _furthest(losses[ours], losses[name]) for name in others if losses[name]}
    if recipe.training.precision == "fp32":
        _require_same(apart)
    seconds = {name: statistics.median(of_loop) for name, of_loop in times.items()}
    return StepTimes(
        recipe=recipe.name,
        steps=len(times[BARE]),
        seconds=seconds,
        ratios={name: seconds[RECIPE] / seconds[name] for name in others},
        loss=losses[RECIPE][-1],
        losses_apart=apart,
        no_peers=no_peers,
    )


def _furthest(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True))


def _require_same(apart: Mapping[str, float]) -> None:
    for name, distance in apart.items():
        if not distance <= SAME_LOSS:
            raise LabError(
                f"the loop {name} does not compute what the recipe does: its losses are up to "
                f"{distance:.1e} away, more than {SAME_LOSS:.0e}; their times are not comparable"
            )


class _TimedRecorder(Recorder):
    """Notes when each step has been recorded as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained = Trained()

    def step(self, step: int, loss: float, *args: Any, **kwargs: Any) -> None:
        super().step(step, loss, *args, **kwargs)
        self.trained.losses.append(loss)
        self.trained.ends.append(time.perf_counter())


def _recipe_loop(recipe: Recipe, world: World, log: RankLog) -> Trained:
    with (
        tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder,
        Console(speaks=False) as console,
    ):
        recorder = _TimedRecorder(
            RunFolder(Path(folder) / "run"), log, console, recipe_toml="", fresh=True
        )
        train(recipe, world, recorder)
        return recorder.trained


def _bare_loop(recipe: Recipe, world: World, log: RankLog) -> Trained:
    """Train as a script of Megatron-Core's would: nothing is recorded, reduced or checked."""
    data, layout, training = recipe.data, recipe.layout, recipe.training
    config, chunks, datasets = _model(recipe, world)
    distributed = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=layout.use_distributed_optimizer
    )
    model = [DistributedDataParallel(config, distributed, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=training.lr,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.use_distributed_optimizer,
        ),
        model,
    )
    for group in optimizer.param_groups:
        # As Megatron-Core's scheduler has it: biases and norms do not decay.
        group["weight_decay"] *= group["wd_mult"]
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    forward_backward = get_forward_backward_func()
    batches = [_micro_batches(recipe, datasets.train) for _ in model]
    replicas = parallel_state.get_data_parallel_world_size()
    trained = Trained()
    for _ in range(training.steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=data.global_batch_size // (data.micro_batch_size * replicas),
            seq_length=data.sequence_length,
            micro_batch_size=data.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        trained.losses.extend(_mean_of_this_rank(reports))
        trained.ends.append(time.perf_counter())
    return trained


PEERS = {"from scratch": train_from_scratch, "plain PyTorch": train_plain_torch}
"""The loops without Megatron-Core."""


def _peer_loop(train: Any, recipe: Recipe, world: World, log: RankLog) -> Trained:
    """Train without Megatron-Core, from its weights; where a CPU stands for a GPU, without that."""
    _, (chunk,), datasets = _model(recipe, world)
    weights, batches = weights_of(chunk), _micro_batches(recipe, datasets.train)
    del chunk
    device = world.device.type
    with torch._C.DisableTorchFunction():
        here = ({name: one.to(device) for name, one in batch.items()} for batch in batches)
        trained: Trained = train(recipe, world, weights, here)
    return trained


def _model(recipe: Recipe, world: World) -> tuple[Any, list[Any], Datasets]:
    """Return Megatron-Core's configuration, this rank's chunks of its model, and the data."""
    parallel_state.initialize_model_parallel(**recipe.layout.model_parallel_sizes())
    torch.manual_seed(recipe.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)
    config = transformer_config(recipe)
    backend = choose_backend(recipe.model.backend, world.device.type)
    datasets = build_datasets(recipe.data)
    chunks = [
        on_device(config, recipe_chunk(recipe, config, stage, backend, datasets.vocab_size))
        for stage in pipeline_stages(recipe.layout)
    ]
    return config, chunks, datasets


def _micro_batches(recipe: Recipe, dataset: Any) -> Iterator[Any]:
    """Return this rank's micro-batches `[b, s]` of all steps: the samples that the recipe takes."""
    size, steps = recipe.data.micro_batch_size, recipe.training.steps
    order = global_batches(recipe, dataset)
    positions = range(steps * recipe.data.global_batch_size)
    micro_batches = [positions[start : start + size] for start in positions[::size]]
    replica = parallel_state.get_data_parallel_rank()
    mine = micro_batches[replica :: parallel_state.get_data_parallel_world_size()]
    indices = [[order.sample_index(position) for position in some] for some in mine]
    return iter(DataLoader(dataset, batch_sampler=indices))


def _mean_of_this_rank(reports: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
    """Return the loss of a step; none where other ranks have a part of it."""
    if not reports or dist.get_world_size() > parallel_state.get_tensor_model_parallel_world_size():
        return []
    loss, tokens = torch.stack([report["loss"] for report in reports]).sum(0).tolist()
    return [loss / tokens]


def _forward_step(batches: Any, model: torch.nn.Module) -> Any:
    batch = slice_for_context_parallel_rank(next(batches))
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    loss, tokens = (losses * mask).sum(), mask.sum()
    # Apart from the loss, which is divided in place.
    return loss, tokens.int(), {"loss": torch.stack([loss.detach(), tokens])}
