"""The sequence-memory task on 1, 2 and 4 ranks: what a rank holds, and how far curves are apart."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.bench.peers.from_scratch import config_of
from mcore_lab.checkpoint import step_folder
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.data.batches import GlobalBatches
from mcore_lab.data.datasets import build_datasets
from mcore_lab.layout import ParallelLayout
from mcore_lab.lessons.transformer import Transformer
from mcore_lab.recipes.story import train
from mcore_lab.runtime import RankLog, choose_device, launch, process_group
from mcore_lab.runtime.memory import TensorMemory
from mcore_lab.training import RunFolder
from mcore_lab.training.console import Console
from mcore_lab.training.recorder import Recorder

RANKS = (1, 2, 4)
REPORTED = (
    ("as reported", 1, "18,397,184", "407.04", "", "7.26", "0.0012 to 0.0013", ""),
    ("as reported", 2, "9,473,536", "255.88", "37.34%", "7.45", "0.0012 to 0.0013", ""),
    ("as reported", 4, "5,011,712", "180.30", "55.70%", "7.62", "0.0012 to 0.0013", ""),
)
"""What an exercise in tensor parallelism from scratch reports of the same model and task; its MB
are taken for MiB. There each number of ranks begins with weights of its own."""
_MEGATRON_CORE: dict[str, dict[str, Any]] = {
    "Megatron-Core": {},
    "Megatron-Core, sp": {"sequence_parallel": True},
    "Megatron-Core, sp, distopt": {"sequence_parallel": True, "use_distributed_optimizer": True},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """How an implementation has learnt the task on so many ranks."""

    implementation: str
    ranks: int
    parameters: int
    """Of the rank that holds most."""
    peak_bytes: int
    """Most bytes of tensors that a rank held at once."""
    saved: float
    """Share of the peak of one rank that each of these does without."""
    losses: tuple[float, ...]
    """Mean loss a token of each step, in nats."""
    apart: float
    """Largest difference of a step's loss from that of one rank, in nats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What a rank held, and the losses that it saw."""

    parameters: int
    peak_bytes: int
    losses: tuple[float, ...]


def compare(recipe: Recipe, folder: Path) -> Iterator[Trained]:
    """Train each implementation on 1, 2 and 4 ranks, from the same weights; yield as they end.

    `folder` is for the run folders. Raises LabError if a run fails.
    """
    whole: Trained | None = None
    for implementation, ranks, run in _runs(recipe, folder):
        held = launch(run, ranks, device=choose_device(ranks).type)
        trained = Trained(
            implementation=implementation,
            ranks=ranks,
            parameters=max(rank.parameters for rank in held),
            peak_bytes=max(rank.peak_bytes for rank in held),
            saved=0.0,
            losses=held[0].losses,
            apart=0.0,
        )
        if ranks == 1 or whole is None:
            whole = trained
        yield _beside(whole, trained)


def _beside(whole: Trained, trained: Trained) -> Trained:
    pairs = zip(whole.losses, trained.losses, strict=True)
    return dataclasses.replace(
        trained,
        saved=1 - trained.peak_bytes / whole.peak_bytes,
        apart=max(abs(one - other) for one, other in pairs),
    )


def _runs(recipe: Recipe, folder: Path) -> Iterator[tuple[str, int, Callable[[], Held]]]:
    """Yield what each rank of a run does; one rank comes before those that are held against it."""
    checkpoint = dataclasses.replace(recipe.checkpoint, save=False)
    recipe = dataclasses.replace(recipe, checkpoint=checkpoint)
    for ranks in RANKS:
        yield "from scratch", ranks, partial(_from_scratch, recipe)
    start = _initial_weights(recipe, folder / "initial")
    checkpoint = dataclasses.replace(checkpoint, load=str(start))
    for name, sizes in _MEGATRON_CORE.items():
        for ranks in RANKS:
            if ranks == 1 and sizes:
                continue
            layout = ParallelLayout(tensor_model_parallel_size=ranks, **sizes)
            own = dataclasses.replace(recipe, checkpoint=checkpoint, layout=layout)
            run_dir = folder / f"{name.lower().replace(', ', '-')}-{ranks}"
            yield name, ranks, partial(_megatron_core, own, run_dir)


def _initial_weights(recipe: Recipe, run_dir: Path) -> Path:
    """Write the checkpoint that all runs on Megatron-Core begin with; return its folder."""
    none = dataclasses.replace(
        recipe,
        training=dataclasses.replace(recipe.training, steps=0),
        checkpoint=dataclasses.replace(recipe.checkpoint, save=True),
    )
    launch(partial(_megatron_core, none, run_dir), 1, device=choose_device(1).type)
    return step_folder(RunFolder(run_dir).checkpoints, 0)


def _from_scratch(recipe: Recipe) -> Held:
    data, training = recipe.data, recipe.training
    losses = []
    with RankLog(int(os.environ["RANK"])), process_group() as world, TensorMemory() as memory:
        everyone = dist.group.WORLD
        assert everyone
        part = Transformer(config_of(recipe), everyone).to(world.device.type)
        optimizer = torch.optim.Adam(part.parameters(), training.lr, fused=True)
        # All ranks take all samples of a step, the same as on Megatron-Core.
        batches = GlobalBatches(
            build_datasets(data).train,
            micro_batch_size=data.global_batch_size,
            global_batch_size=data.global_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
            seed=training.seed,
        )
        for step in range(training.steps):
            (batch,) = batches.after(step * data.global_batch_size)
            optimizer.zero_grad()
            loss = part.loss(batch["tokens"].T, batch["labels"].T)
            loss.backward()
            part.clip_gradients(training.clip_grad)
            optimizer.step()
            losses.append(loss.item())
    parameters = sum(parameter.numel() for parameter in part.parameters())
    return Held(parameters=parameters, peak_bytes=memory.peak, losses=tuple(losses))


class _Counting(Recorder):
    """Counts the parameters, and keeps the losses, as well."""

    parameters = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def look_at_start(self, model: list[torch.nn.Module], *optimizer: Any) -> None:
        self.parameters = sum(
            parameter.numel() for chunk in model for parameter in chunk.parameters()
        )

    def step(self, step: int, loss: float, *args: Any, **kwargs: Any) -> None:
        super().step(step, loss, *args, **kwargs)
        self.losses.append(loss)


def _megatron_core(recipe: Recipe, run_dir: Path) -> Held:
    with (
        RankLog(int(os.environ["RANK"])) as log,
        process_group() as world,
        Console(speaks=False) as console,
        TensorMemory() as memory,
    ):
        toml = recipe_to_toml(recipe)
        recorder = _Counting(RunFolder(run_dir), log, console, recipe_toml=toml, fresh=True)
        train(recipe, world, recorder)
    return Held(
        parameters=recorder.parameters, peak_bytes=memory.peak, losses=tuple(recorder.losses)
    )
