"""What a checkpoint holds, read from what describes it: no tensor, and no torch."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mcore_lab.checkpoint.manifest import files_in, read_manifest
from mcore_lab.checkpoint.trust import damaged, read_metadata

_BITS = re.compile(r"(\d+)")
_STATE = re.compile(
    r"optimizer\.(?:.*?\.)?(?:exp_avg_sq|exp_avg|fp32_param|step|momentum_buffer)\."
)
_NUMBERED = re.compile(r"(.*\blayers\.\d+)\.")
_STACKED = re.compile(r"(.*\blayers)\.(?!\d)")
_WRITER = re.compile(r"__(\d+)_\d+\.distcp")


class Place(NamedTuple):
    """Where the bytes of something are."""

    file: str
    position: int
    length: int


class Chunk(NamedTuple):
    """A part of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Tensor:
    """A whole tensor of a checkpoint, of which ranks hold parts."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.numel * _bytes_of(self.dtype)

    @property
    def is_state(self) -> bool:
        """Whether it is the optimizer's, and not a weight."""
        return self.name.startswith("optimizer.")

    def by_layer(self) -> Iterator[tuple[str, int]]:
        """Return where in the model it belongs, and how many of its numbers belong there.

        Megatron-Core stacks the same weight of like layers along a first axis.
        """
        name = _STATE.sub("", self.name)
        if match := _NUMBERED.match(name):
            yield match[1], self.numel
        elif (match := _STACKED.match(name)) and self.shape:
            for layer in range(self.shape[0]):
                yield f"{match[1]}.{layer}", self.numel // self.shape[0]
        else:
            yield name.rpartition(".")[0] or name, self.numel


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint."""

    name: str
    rank: int
    """The rank that wrote it."""
    size: int
    """In bytes."""
    items: int
    """Parts of tensors, and other objects, that are in it."""


class Contents(NamedTuple):
    """What the shards of a checkpoint hold, by name."""

    tensors: dict[str, Tensor]
    objects: dict[str, Place]
    """All that is no tensor, by Megatron-Core's `ShardedObject.unique_key`."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name. Raises CheckpointError if it cannot be read."""
    return contents_of(folder).tensors


def contents_of(folder: Path) -> Contents:
    """Return what a checkpoint holds. Raises CheckpointError if it cannot be read."""
    metadata = read_metadata(folder)
    # A pickle of harmless records may still be of anything.
    try:
        return _contents(metadata)
    except Exception as error:
        raise damaged(folder, error) from None


def _contents(metadata: Any) -> Contents:
    tensors = {
        name: kind for name, kind in metadata.state_dict_metadata.items() if hasattr(kind, "size")
    }
    shapes = {
        (name, tuple(chunk.offsets)): tuple(chunk.sizes)
        for name, kind in tensors.items()
        for chunk in kind.chunks
    }
    chunks = defaultdict(list)
    objects = {}
    for index, stored in metadata.storage_data.items():
        place = Place(stored.relative_path, stored.offset, stored.length)
        offsets = tuple(getattr(index, "offset", None) or ())
        if (index.fqn, offsets) in shapes:
            chunks[index.fqn].append(Chunk(offsets, shapes.pop((index.fqn, offsets)), place))
        elif index.fqn not in tensors:
            objects[index.fqn] = place
    whole = {
        name: Tensor(name, tuple(kind.size), _dtype(kind), tuple(chunks[name]))
        for name, kind in tensors.items()
    }
    return Contents(whole, objects)


def stored_files(folder: Path) -> list[StoredFile]:
    """Return the files of a checkpoint, with the rank that wrote each."""
    manifest = read_manifest(folder)
    items: dict[str, int] = defaultdict(int)
    for place in read_metadata(folder).storage_data.values():
        items[place.relative_path] += 1
    written = manifest.files if manifest else {}
    return [
        StoredFile(
            name, written[name].rank if name in written else _writer(name), size, items[name]
        )
        for name, path in sorted(files_in(folder).items())
        for size in [path.stat().st_size]
    ]


def parameters_by_layer(tensors: dict[str, Tensor]) -> dict[str, tuple[int, int, int]]:
    """Return parameters, their bytes, and the optimizer's bytes of each layer, in model order."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in tensors.values():
        for layer, numel in tensor.by_layer():
            size = numel * _bytes_of(tensor.dtype)
            counts = (0, 0, size) if tensor.is_state else (numel, size, 0)
            found[layer] = [a + b for a, b in zip(found[layer], counts, strict=True)]
    return {layer: (a, b, c) for layer, (a, b, c) in found.items()}


def _dtype(kind: Any) -> str:
    properties = kind.properties
    return str(properties.arguments[0] if properties.arguments else properties.dtype)


def _bytes_of(dtype: str) -> int:
    bits = _BITS.search(dtype)
    return int(bits[1]) // 8 if bits else 1


def _writer(name: str) -> int:
    match = _WRITER.fullmatch(name)
    return int(match[1]) if match else 0
