"""The tensors of safetensors files, put into a model of any layout, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mcore_lab.checkpoint.load import shapes_of_all_ranks, sharded_tensors
from mcore_lab.checkpoint.state import model_state
from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.naming import Named, Shape, differences, in_a_line
from mcore_lab.exchange.safetensors_read import SafetensorsFiles
from mcore_lab.runtime.together import fail_together

Naming = Callable[[Mapping[str, Shape]], list[Named]]
"""`megatron_names`, or `huggingface_names` of a model with certain heads."""


@torch.no_grad()
def fill(chunks: Sequence[torch.nn.Module], files: SafetensorsFiles, naming: Naming) -> set[str]:
    """Put the tensors of the files into this rank's part of a model; every rank calls this.

    Returns the names of those that had to be rounded to the model's precision. Raises
    CheckpointError, on every rank, if they are not of this model or cannot be read.
    """
    state = model_state(chunks)
    named = naming(shapes_of_all_ranks(state))
    with fail_together():
        _require_same_model(files, named)
        source = _Source(files, named)
        for part in sharded_tensors(state):
            source.put(part)
    return source.rounded


class _Place(NamedTuple):
    at: tuple[int, ...]
    """Index of the tensor's first axes."""
    inside: tuple[int, ...]
    """Of the part's: where it has what is at that index."""
    outside: tuple[slice, ...]
    """What of it the part has."""


class _Source:
    """The files' tensors as a checkpoint's; the last that was put together is kept."""

    def __init__(self, files: SafetensorsFiles, named: Sequence[Named]) -> None:
        self._files = files
        self._of: dict[str, dict[tuple[int, ...], list[Named]]] = defaultdict(dict)
        for one in named:
            self._of[one.key].setdefault(one.index, []).append(one)
        self._last: tuple[list[Named], torch.Tensor] = ([], torch.empty(0))
        self.rounded: set[str] = set()

    def put(self, part: ShardedTensor) -> None:
        """Fill a rank's part of a tensor."""
        data = part.data.view((1,) * part.prepend_axis_num + tuple(part.local_shape))
        for at, inside, outside in self._places(part, tuple(data.shape)):
            named = self._of[part.key][at]
            whole = self._whole(named)
            data[inside].copy_(whole[outside])
            if torch.promote_types(whole.dtype, data.dtype) != data.dtype:
                self.rounded.update(one.name for one in named)

    def _places(self, part: ShardedTensor, shape: Shape) -> Iterator[_Place]:
        """Yield where a part of `shape` has what is at each index of the tensor's first axes."""
        depth = len(next(iter(self._of[part.key])))
        starts = tuple(part.global_offset)
        sides = zip(starts[depth:], shape[depth:], strict=True)
        outside = tuple(slice(start, start + size) for start, size in sides)
        for inside in product(*map(range, shape[:depth])):
            at = tuple(map(sum, zip(starts[:depth], inside, strict=True)))
            yield _Place(at, inside, outside)

    def _whole(self, named: list[Named]) -> torch.Tensor:
        if self._last[0] is not named:
            self._last = ([], torch.empty(0))
            self._last = (named, self._together(named))
        return self._last[1]

    def _together(self, named: list[Named]) -> torch.Tensor:
        first = self._files.read(named[0].name)
        if len(named) == 1:
            return first
        rows = sum(one.shape[0] for one in named)
        whole = first.new_empty((rows, *first.shape[1:]))
        for one in named:
            tensor = self._files.read(one.name)
            for part, lines in zip(tensor.split([*map(len, one.rows)]), one.rows, strict=True):
                whole[lines.start : lines.stop] = part
        return whole


def _require_same_model(files: SafetensorsFiles, named: Sequence[Named]) -> None:
    if off := list(differences(named, files.shapes)):
        raise CheckpointError(f"{files.path} is not of this model: {in_a_line(off)}")
