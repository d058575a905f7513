"""Tensors of a checkpoint, put together of the parts that ranks have written, without any rank."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch

from mcore_lab.checkpoint.contents import Chunk, Tensor
from mcore_lab.checkpoint.failures import failures_explained
from mcore_lab.errors import CheckpointError


def read(folder: Path, tensor: Tensor, index: tuple[int, ...] = ()) -> torch.Tensor:
    """Return a tensor, or what it has at `index` of its first axes: of one layer, of one expert.

    No more than that is read, and the parts that it lies in one at a time. Raises CheckpointError
    if it cannot be read, or if parts of it are missing.
    """
    shape = tensor.shape[len(index) :]
    parts = [chunk for chunk in tensor.chunks if _holds(chunk, index)]
    there = sum(math.prod(chunk.shape[len(index) :]) for chunk in parts)
    if there != math.prod(shape):
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: it holds {there:,} numbers of "
            f"{tensor.name}{list(index) or ''} in place of {math.prod(shape):,}"
        )
    with failures_explained("read", folder):
        if len(parts) == 1:
            return _stored(folder, parts[0], index)
        whole = torch.empty(shape, dtype=getattr(torch, tensor.dtype))
        for chunk in parts:
            part = _stored(folder, chunk, index)
            sides = zip(chunk.offsets[len(index) :], part.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in sides)] = part
        return whole


def _holds(chunk: Chunk, index: tuple[int, ...]) -> bool:
    sides = zip(index, chunk.offsets, chunk.shape, strict=False)
    return all(start <= number < start + size for number, start, size in sides)


def _stored(folder: Path, chunk: Chunk, index: tuple[int, ...]) -> torch.Tensor:
    with (folder / chunk.file).open("rb") as file:
        file.seek(chunk.position)
        stored = io.BytesIO(file.read(chunk.length))
    part: torch.Tensor = torch.load(stored, map_location="cpu", weights_only=True)
    within = zip(index, chunk.offsets, strict=False)
    return part[tuple(number - start for number, start in within)]
