"""Where in a checkpoint the tensors of a file lie; Megatron-Core's own names of them. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

REDUNDANT = re.compile(r"lm_head\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""What some files of Hugging Face's have beside a model's weights: those of a tied output layer are
the embedding's, and the rotary frequencies are computed."""

_STACKED = re.compile(r"(.*\blayers)\.(?!\d)(.*)")
_SHOWN = 3


@dataclass(frozen=True)
class Named:
    """A tensor of a file, as a part of one of a checkpoint."""

    name: str
    """In the file."""
    key: str
    """In the checkpoint."""
    index: tuple[int, ...]
    """Of the first axes there: a layer's number, an expert's."""
    rows: tuple[range, ...]
    """Of the axis after them: one after the other they are the tensor."""
    shape: Shape

    @classmethod
    def part_of(
        cls,
        key: str,
        shape: Shape,
        name: str,
        index: tuple[int, ...] = (),
        rows: tuple[range, ...] = (),
    ) -> Named:
        """Return a part of the tensor `key` of `shape`: `rows`, or all, of what is at `index`."""
        whole = shape[len(index) :]
        if not rows:
            return cls(name, key, index, (range(whole[0]),) if whole else (), whole)
        return cls(name, key, index, rows, (sum(map(len, rows)), *whole[1:]))


def megatron_names(tensors: Mapping[str, Shape]) -> list[Named]:
    """Return every tensor under Megatron-Core's name, those of stacked layers one by one.

    `decoder.layers.mlp.linear_fc2.weight` of two layers is `decoder.layers.0.mlp.linear_fc2.weight`
    and `decoder.layers.1.…`; the experts of a layer stay together, along the first axis.
    """
    return [named for key, shape in tensors.items() for named in _by_layer(key, shape)]


def _by_layer(key: str, shape: Shape) -> Iterator[Named]:
    match = _STACKED.fullmatch(key)
    if match is None or not shape:
        yield Named.part_of(key, shape, key)
        return
    for layer in range(shape[0]):
        yield Named.part_of(key, shape, f"{match[1]}.{layer}.{match[2]}", (layer,))


def differences(wanted: Iterable[Named], there: Mapping[str, Shape]) -> Iterator[str]:
    """Say, a line each, how the tensors that are there are not those that are wanted."""
    shapes = {named.name: named.shape for named in wanted}
    for name, shape in shapes.items():
        if name not in there:
            yield f"{name} is not in it"
        elif there[name] != shape:
            yield f"{name} is {there[name]} in it and {shape} in this model"
    for name in sorted(there.keys() - shapes.keys()):
        if not REDUNDANT.fullmatch(name):
            yield f"{name} is in it and not in this model"


def in_a_line(found: list[str]) -> str:
    """Return the first few of what was found, and how many more there are."""
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
