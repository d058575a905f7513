"""Tensors of a checkpoint, put together of the parts that ranks have written.

Any rank, or none, reads what it needs by itself. Torch's own reader (`FileSystemReader`, through
2.13) has every tensor taken apart by an unpickler in Python, and Megatron-Core (before 0.17) first
has the ranks agree on who reads what, though each reads its own: for a small checkpoint, that is
most of the time that it takes to load it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mcore_lab.checkpoint.contents import Chunk, Place, Tensor
from mcore_lab.checkpoint.failures import failures_explained
from mcore_lab.checkpoint.trust import makings_of_tensor, plain_value
from mcore_lab.errors import CheckpointError

_DTYPES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""By the names that torch.save gives them."""
_BYTE_ORDER = "byteorder"


def read(folder: Path, tensor: Tensor, index: tuple[int, ...] = ()) -> torch.Tensor:
    """Return a tensor, or what it has at `index` of its first axes: of one layer, of one expert.

    No more than that is read, and the parts that it lies in one at a time. Raises CheckpointError
    if it cannot be read, or if parts of it are missing.
    """
    shape = tensor.shape[len(index) :]
    with failures_explained("read", folder):
        shards = Shards(folder)
        if len(tensor.chunks) == 1 and tensor.chunks[0].shape == tensor.shape:
            return shards.part(tensor.chunks[0])[index]
        whole = torch.zeros(shape, dtype=getattr(torch, tensor.dtype))
        shards.fill(whole[(None,) * len(index)], tensor, (*index, *(0 for _ in shape)))
        return whole


class Shards:
    """The shards of a checkpoint.

    What is wrong with them is raised as CheckpointError, or in whatever kind torch raises it: see
    `failures_explained`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, region: torch.Tensor, tensor: Tensor, start: Sequence[int]) -> None:
        """Put into `region` what the tensor has from `start` on, in the precision of `region`.

        Raises CheckpointError if parts of that are missing.
        """
        filled = 0
        for chunk in tensor.chunks:
            if common := _common(chunk, start, region.shape):
                here, there = common
                part = self.part(chunk)[there]
                region[here].copy_(part)
                filled += part.numel()
        if filled != region.numel():
            where = f" from {[*start]} on" if any(start) else ""
            raise CheckpointError(
                f"cannot read the checkpoint {self.folder}: it holds {filled:,} numbers of "
                f"{tensor.name}{where} in place of {region.numel():,}"
            )

    def part(self, chunk: Chunk) -> torch.Tensor:
        """Return a part of a tensor as it was written."""
        stored = self._bytes(chunk.place)
        part = _plain_tensor(stored)
        if part is None:
            part = _loaded(stored)
        if part.shape != chunk.shape:
            raise CheckpointError(
                f"cannot read the checkpoint {self.folder}: {chunk.place.file} has a tensor of "
                f"{[*part.shape]} in place of one of {[*chunk.shape]}"
            )
        return part

    def object(self, place: Place) -> Any:
        """Return what is no tensor, if it is made of tensors and plain values."""
        stored = self._bytes(place)
        # Most objects are the extra state of a layer that has none: not worth torch's unpickler.
        value = plain_value(_pickled(_opened(stored)))
        return _loaded(stored) if value is None else value[0]

    def _bytes(self, place: Place) -> bytes:
        # One at a time: a checkpoint of a thousand ranks has more than a process may have open.
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.position)
            return file.read(place.length)


def _common(
    chunk: Chunk, start: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return what a region and a chunk of a tensor have in common, in the one and in the other."""
    here, there = [], []
    for first, size, offset, length in zip(start, shape, chunk.offsets, chunk.shape, strict=True):
        low, high = max(first, offset), min(first + size, offset + length)
        if low >= high:
            return None
        here.append(slice(low - first, high - first))
        there.append(slice(low - offset, high - offset))
    return tuple(here), tuple(there)


def _loaded(stored: bytes) -> Any:
    return torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)


def _opened(stored: bytes) -> torch._C.PyTorchFileReader:
    return torch._C.PyTorchFileReader(io.BytesIO(stored))


def _pickled(file: torch._C.PyTorchFileReader) -> bytes:
    pickled: bytes = file.get_record("data.pkl")
    return pickled


def _plain_tensor(stored: bytes) -> torch.Tensor | None:
    """Return a tensor as torch.load does, or None if it is not of the plainest kind."""
    file = _opened(stored)
    makings = makings_of_tensor(_pickled(file))
    if makings is None or makings.storage not in _DTYPES:
        return None
    if _BYTE_ORDER not in file.get_all_records():
        return None  # Written before torch 2.1.
    if file.get_record(_BYTE_ORDER).decode() != sys.byteorder:
        return None
    dtype, record = _DTYPES[makings.storage], f"data/{makings.key}"
    # Earlier releases of torch take the pickle's word for how much memory the record fills.
    size_of = getattr(file, "get_record_size", None)
    if size_of is None or size_of(record) != makings.numel * dtype.itemsize:
        return None
    numbers = file.get_storage_from_record(record, makings.numel, dtype)
    storage = numbers.untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, makings.offset, makings.shape, makings.stride)
