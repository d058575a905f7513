"""Write a sharded checkpoint: beside, then published by one rename."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from mcore_lab.checkpoint.failures import failures_explained
from mcore_lab.checkpoint.state import Progress, content_metadata, full_state
from mcore_lab.errors import CheckpointError
from mcore_lab.runtime.together import fail_together


def save_checkpoint(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
    recipe: str,
) -> Path:
    """Save the `full_state` of a run to `folder`, and return it; every rank calls this.

    The folder appears when it is whole. Raises CheckpointError where it cannot be written, and
    leaves nothing of it.
    """
    state = full_state(chunks, optimizer, scheduler, progress, recipe)
    size = _bytes_of_all_ranks(state)
    _write_without_a_process()
    with (
        _published(folder, size) as unfinished,
        _same_reason_on_every_rank(),
        failures_explained("write", folder),
    ):
        metadata = content_metadata(chunks)
        dist_checkpointing.save(state, str(unfinished), content_metadata=metadata)
    return folder


@contextmanager
def _same_reason_on_every_rank() -> Iterator[None]:
    """Tell every rank why a writer failed: torch stops them all, but tells why to rank 0 alone."""
    try:
        yield
    except CheckpointError as error:
        if isinstance(error.__cause__, CheckpointException):
            with fail_together():
                if dist.get_rank() == 0:
                    raise
        raise


def _bytes_of_all_ranks(state: dict[str, Any]) -> int:
    tensors = (
        value.data
        for value in nested_values(state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
        and is_main_replica(value.replica_id)
    )
    size = torch.tensor(
        sum(tensor.nbytes for tensor in tensors), device=torch.cuda.current_device()
    )
    dist.all_reduce(size)
    return int(size)


@contextmanager
def _published(folder: Path, size: int) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of `folder` if the body succeeds."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with fail_together(), failures_explained("write", folder):
        if dist.get_rank() == 0:
            _make_room(unfinished, size)
    try:
        yield unfinished
        with fail_together(), failures_explained("write", folder):
            if dist.get_rank() == 0:
                _put_in_place(unfinished, folder)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)


def _make_room(unfinished: Path, size: int) -> None:
    # What a run that was killed had begun to write can be of any step.
    for begun in unfinished.parent.glob(".step-*"):
        shutil.rmtree(begun, ignore_errors=True)
    unfinished.mkdir(parents=True)
    free = shutil.disk_usage(unfinished).free
    if free < size:
        unfinished.rmdir()
        raise CheckpointError(
            f"cannot write the checkpoint to {unfinished.parent}: it takes {size / 1e6:,.1f} MB, "
            f"and {free / 1e6:,.1f} MB are free; --checkpoint.save False runs without checkpoints"
        )


def _put_in_place(unfinished: Path, folder: Path) -> None:
    if folder.exists():
        # Where a run that went on from an earlier step comes to this one again.
        replaced = folder.with_name(f".{folder.name}.replaced")
        folder.rename(replaced)
        unfinished.rename(folder)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(folder)


def _write_without_a_process() -> None:
    """Hand Megatron-Core a plain queue for its writers' results.

    Its own starts a process, which costs each rank seconds of imports and runs a program without
    an `if __name__ == "__main__"` twice. A synchronous save writes in this process.
    """
    filesystem_async._results_queue = queue.Queue()
