"""Write a checkpoint's files: what Megatron-Core plans, in threads, hashed while it is written.

Megatron-Core's own save goes on after a rank's disk has failed, into collectives that the others
wait in. Here no file is written between two of them, so that a failure is told to every rank and
training can go on after it. No process is started.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.storage import WriteResult

from mcore_lab import compat
from mcore_lab.checkpoint.copies import Copies
from mcore_lab.checkpoint.manifest import FileRecord

_WRITE_ITEM: Any = filesystem._write_item
"""torch's own, which Megatron-Core's writers call too; its arguments differ between versions."""
_MOST_THREADS = 2
"""Writers of a rank, each with a file of its own; Megatron-Core's default before 0.19."""
_SMALL_BYTES = 2**16
"""Pieces of up to so many are gathered: a small tensor comes in 39, most of them of a few bytes."""


class Plan(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy, up to the plan of what each rank writes."""

    writer: Any
    """A `FileSystemWriterAsync`, with this rank's buckets of objects and tensors."""
    metadata: Any
    """What will be `.metadata`, on rank 0."""
    failures: list[Exception]
    """What kept rank 0 from writing the state that is common to all ranks."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


class Written(NamedTuple):
    """What a rank has written: where each item lies, and a record of each file."""

    items: list[WriteResult]
    files: dict[str, FileRecord]


def plan(
    state: dict[str, Any], folder: Path, content_metadata: dict[str, Any], *, check: bool
) -> Plan:
    """Let the ranks agree on who writes what of `state`; every rank calls this.

    With `check`, Megatron-Core raises an error if parts of a tensor are no rank's, or of several.
    Before Megatron-Core 0.17 `common.pt` is written on the way, by rank 0.
    """
    # Planning makes a queue for results, by default in a process that imports everything anew.
    filesystem_async._results_queue = queue.Queue()
    planned = Plan("torch_dist", 1, thread_count=_threads())
    with compat.common_state_failures() as planned.failures:
        dist_checkpointing.save(
            state,
            str(folder),
            planned,
            async_sharded_save=True,
            validate_access_integrity=check,
            content_metadata=content_metadata,
            **compat.own_async_save(),
        )
    return planned


def _threads() -> int:
    # More than a rank has cores would wait for each other, and write more and smaller files.
    return min(_MOST_THREADS, torch.get_num_threads())


def buckets_of(planned: Plan, copies: Copies | None) -> list[Any]:
    """Return what each file of this rank holds, in memory of the CPU.

    With `copies` it stays as it is now, whatever becomes of the tensors.
    """
    for failure in planned.failures:
        raise failure
    buckets = planned.writer.write_buckets
    tensors = [tensor for _, _, (_, tensors) in buckets for _, tensor in tensors]
    here = iter(copies.make(tensors) if copies else map(_on_cpu, tensors))
    return [
        (path, name, (objects, [(item, next(here)) for item, _ in tensors]))
        for path, name, (objects, tensors) in buckets
    ]


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    # Not `.to` for all: where a CPU stands for a GPU, it makes the copy that it would make there.
    return tensor if tensor.device.type == "cpu" else tensor.to("cpu")


def write_shards(planned: Plan, buckets: list[Any]) -> Written:
    """Write this rank's shards, each on disk when it is done. Holds no collective."""
    writer = planned.writer
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    with _no_crc32(), ThreadPoolExecutor(_threads()) as pool:
        done = list(pool.map(partial(_write_shard, transforms), buckets))
    files = {
        name: FileRecord(stream.size, stream.hash.hexdigest(), dist.get_rank())
        for (_, name, _), (stream, _) in zip(buckets, done, strict=True)
    }
    return Written([item for _, items in done for item in items], files)


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Let torch.save take no check sums, of 0.6 s a gigabyte: nothing reads them.

    torch's reader is built without their check (`MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS`), and every
    file has a SHA-256.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def finish(planned: Plan, folder: Path, of_ranks: list[Written]) -> None:
    """Write `.metadata` and `metadata.json`, on rank 0, when every rank has written its shards."""
    planned.writer.finish(planned.metadata, [written.items for written in of_ranks])
    save_config(CheckpointingConfig(planned.backend, planned.version), str(folder))


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written from its beginning to its end.

    Its failure is kept until `check`: torch's writer calls it from C++, writes on while it is
    taken apart by an error, and ends the process by that.
    """

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self._small = bytearray()
        self._failure: OSError | None = None
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        if size > _SMALL_BYTES:
            self._write_small()
            self._write(data)
        else:
            self._small += data
            if len(self._small) > _SMALL_BYTES:
                self._write_small()
        return size

    def check(self) -> None:
        """Raise what has kept the file from being written."""
        if self._failure:
            raise self._failure

    def finish(self) -> None:
        """Write what is left, and see that all is on disk."""
        self._write_small()
        self.check()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_small(self) -> None:
        self._write(self._small)
        self._small = bytearray()

    def _write(self, data: Any) -> None:
        self.hash.update(data)
        try:
            if not self._failure:
                self._file.write(data)
        except OSError as error:
            # Without its traceback, whose frames would keep `data`: memory that the writer frees.
            self._failure = OSError(error.errno, error.strerror)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Leave it to the end: torch asks for it after every tensor."""


def _write_shard(transforms: list[Any], bucket: Any) -> tuple[_Hashed, list[WriteResult]]:
    path, name, (objects, tensors) = bucket
    with Path(path).open("wb") as file:
        stream = _Hashed(file)
        items = []
        for item, data in (*objects, *tensors):
            items.append(_WRITE_ITEM(*transforms, stream, data, item, name, **_serialization()))
            stream.check()
        stream.finish()
    return stream, items


def _serialization() -> dict[str, Any]:
    """Return the argument by which torch, from 2.7 on, is told how to write a tensor."""
    if "serialization_format" not in inspect.signature(_WRITE_ITEM).parameters:
        return {}
    return {"serialization_format": filesystem.SerializationFormat.TORCH_SAVE}
