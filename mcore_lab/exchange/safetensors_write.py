"""Write safetensors files tensor by tensor. `safetensors` itself holds a whole file in memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and place
of each tensor), and the numbers. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.naming import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
_ALIGNMENT = 8
_METADATA = {"format": "pt"}
"""transformers refuses a file that does not say so."""


class Declared(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: str
    """torch's name of it, without `torch.`."""
    shape: Shape

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _dtype(self.dtype).itemsize


def write_files(
    folder: Path, declared: Sequence[Declared], tensors: Iterator[torch.Tensor], shard_size: int
) -> list[Path]:
    """Write the tensors to `folder`, in the order in which they are declared; return the files.

    A file has `shard_size` bytes of tensors at most, or one tensor; several come with an index.
    Each is on disk when the next is begun. Raises OSError as the disk does, and CheckpointError for
    a type of numbers that safetensors does not have, or a tensor that is not as it was declared.
    """
    shards = _shards(declared, shard_size)
    names = [SINGLE]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in numbers]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_file(file, shard, tensors)
            _flush(file)
    if len(shards) > 1:
        where = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        total = sum(one.size for one in declared)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    return [folder / name for name in names]


def write_text(path: Path, text: str) -> None:
    """Write a small file, on disk when it is done."""
    with path.open("wb") as file:
        file.write(text.encode())
        _flush(file)


def _shards(declared: Sequence[Declared], size: int) -> list[list[Declared]]:
    shards: list[list[Declared]] = [[]]
    room = size
    for one in declared:
        if one.size > room and shards[-1]:
            shards.append([])
            room = size
        shards[-1].append(one)
        room -= one.size
    return shards


def _write_file(file: BinaryIO, shard: list[Declared], tensors: Iterator[torch.Tensor]) -> None:
    file.write(_header(shard))
    for one in shard:
        tensor = next(tensors)
        if (tuple(tensor.shape), tensor.dtype) != (one.shape, _dtype(one.dtype)):
            raise CheckpointError(
                f"{one.name} is {tuple(tensor.shape)} of {tensor.dtype} in place of {one.shape} "
                f"of torch.{one.dtype}"
            )
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        # The next one is read without this one in memory.
        del tensor


def _header(shard: list[Declared]) -> bytes:
    header: dict[str, object] = {"__metadata__": _METADATA}
    at = 0
    for one in shard:
        places = [at, at := at + one.size]
        code = {"dtype": _CODES[one.dtype], "shape": one.shape, "data_offsets": places}
        header[one.name] = code
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _dtype(name: str) -> torch.dtype:
    if name not in _CODES:
        raise CheckpointError(f"safetensors has no numbers of the type {name}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
