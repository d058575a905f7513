"""Write a sharded checkpoint: beside, then published by one rename."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.checkpoint.state import full_state


def save_checkpoint(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    step: int,
) -> Path:
    """Save weights, optimizer, schedule and step to `folder`, which every rank calls for; return it.

    The folder appears when it is whole. Raises CheckpointError where it cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    _write_without_a_process()
    dist_checkpointing.save(full_state(chunks, optimizer, scheduler, step), str(unfinished))
    dist.barrier()
    if dist.get_rank() == 0:
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    dist.barrier()
    return folder


def _write_without_a_process() -> None:
    """Hand Megatron-Core a plain queue for its writers' results.

    Its own starts a process, which costs each rank seconds of imports and runs a program without
    an `if __name__ == "__main__"` twice. A synchronous save writes in this process.
    """
    filesystem_async._results_queue = queue.Queue()
