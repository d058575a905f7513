"""Write a sharded checkpoint: beside, then published by one rename."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from mcore_lab.checkpoint import publication
from mcore_lab.checkpoint.copies import Copies
from mcore_lab.checkpoint.failures import failures_explained
from mcore_lab.checkpoint.folders import hidden
from mcore_lab.checkpoint.manifest import MANIFEST, FileRecord, Manifest, files_in, record
from mcore_lab.checkpoint.state import Progress, content_metadata, full_state
from mcore_lab.checkpoint.write import Plan, Written, buckets_of, finish, plan, write_shards
from mcore_lab.errors import CheckpointError
from mcore_lab.runtime.together import fail_together
from mcore_lab.version import installed_version


def save_checkpoint(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
    recipe: str,
    *,
    keep: int | None = None,
    is_first: bool = True,
) -> Path:
    """Save the `full_state` of a run to `folder`, and return it; every rank calls this.

    The folder appears when it is whole, and is then the latest; then all but `keep` checkpoints
    beside it are removed. Of the first checkpoint that a run saves, it is checked that the parts of
    the ranks make up whole tensors: they do so in all, or in none. Raises CheckpointError, on every
    rank, where it cannot be written, and leaves nothing of it.
    """
    run = (chunks, optimizer, scheduler)
    return begin_save(folder, *run, progress, recipe, keep=keep, is_first=is_first).finish()


def begin_save(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
    recipe: str,
    *,
    keep: int | None = None,
    is_first: bool = True,
    copies: Copies | None = None,
) -> Save:
    """Begin a `save_checkpoint`; what it returns ends it. Every rank calls this.

    With `copies` the state is copied, and written while the ranks go on; they are for one save at a
    time.
    """
    state = full_state(chunks, optimizer, scheduler, progress, recipe)
    unfinished = hidden(folder, "unfinished")
    size = _bytes_of_all_ranks(state)
    with fail_together(), failures_explained("write", folder):
        if dist.get_rank() == 0:
            publication.make_room(unfinished, size)
    with _removed_on_failure(unfinished):
        with _same_reason_on_every_rank(), failures_explained("write", folder):
            planned = plan(state, unfinished, content_metadata(chunks), check=is_first)
        with fail_together(), failures_explained("write", folder):
            buckets = buckets_of(planned, copies)
    write = partial(write_shards, planned, buckets)
    return Save(folder, progress.step, planned, _begun(write) if copies else write, keep)


class Save:
    """A checkpoint on its way: each rank writes its part, then all of them publish the whole."""

    def __init__(
        self,
        folder: Path,
        step: int,
        planned: Plan,
        write: Callable[[], Written] | Future[Written],
        keep: int | None,
    ) -> None:
        self.folder, self.step = folder, step
        self._planned, self._write, self._keep = planned, write, keep

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is, so that `finish` waits for the other ranks' alone."""
        return isinstance(self._write, Future) and self._write.done()

    def finish(self) -> Path:
        """Publish the checkpoint when every rank has written its part; every rank calls this.

        Returns its folder. Raises CheckpointError as `save_checkpoint` does.
        """
        folder, write = self.folder, self._write
        unfinished = hidden(folder, "unfinished")
        is_first = dist.get_rank() == 0
        with _removed_on_failure(unfinished):
            with fail_together(), failures_explained("write", folder):
                written = write.result() if isinstance(write, Future) else write()
            of_ranks = _on_rank_0(written)
            with fail_together(), failures_explained("write", folder):
                if is_first:
                    finish(self._planned, unfinished, of_ranks)
                    _write_manifest(unfinished, self.step, of_ranks)
            with fail_together(), failures_explained("write", folder):
                if is_first:
                    publication.publish(unfinished, folder, self.step)
        with fail_together():
            if self._keep and is_first:
                in_background = isinstance(write, Future)
                publication.prune(
                    folder.parent, self._keep, latest=self.step, in_background=in_background
                )
        return folder


def _begun(write: Callable[[], Written]) -> Future[Written]:
    """Let a thread of its own write."""
    with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    begun = with_one_thread.submit(write)
    with_one_thread.shutdown(wait=False)
    return begun


@contextmanager
def _removed_on_failure(unfinished: Path) -> Iterator[None]:
    """Leave nothing of a checkpoint that could not be written."""
    try:
        yield
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _same_reason_on_every_rank() -> Iterator[None]:
    """Tell every rank why planning failed: torch stops them all, but tells why to rank 0 alone."""
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


def _on_rank_0(written: Written) -> list[Written]:
    """Return what every rank has written; on the others, nothing."""
    of_ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(written, of_ranks)
    return of_ranks or []


def _write_manifest(unfinished: Path, step: int, of_ranks: list[Written]) -> None:
    """Write down every file that is there, and see that all of it is on disk; rank 0 does."""
    files: dict[str, FileRecord] = {}
    for written in of_ranks:
        files |= written.files
    for name, path in files_in(unfinished).items():
        # Shards are on disk and hashed since they were written.
        if name not in files:
            files[name] = record(path, rank=0)
            publication.sync(path)
    manifest = Manifest(
        step=step,
        world_size=dist.get_world_size(),
        layout=_layout_sizes(),
        versions=_versions(),
        files=files,
    )
    (unfinished / MANIFEST).write_bytes(manifest.render())
    publication.sync(unfinished / MANIFEST)
    publication.sync(unfinished)


def _layout_sizes() -> dict[str, int]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "dp": parallel_state.get_data_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _versions() -> dict[str, str]:
    return {
        "mcore_lab": installed_version(),
        "megatron-core": version("megatron-core"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
