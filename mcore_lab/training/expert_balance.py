"""How evenly a mixture of experts is loaded. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Load = dict[str, list[int]]
"""Tokens of each expert, by layer: `layer_1` is the decoder's first, `mtp_1` the first of
multi-token prediction."""


def imbalance(tokens: Sequence[int]) -> float:
    """Return the most loaded expert's tokens by the mean of all: 1 if each has the same."""
    return max(tokens) * len(tokens) / max(sum(tokens), 1)


def worst_imbalance(load: Mapping[str, Sequence[int]]) -> float | None:
    """Return the imbalance of the layer where it is greatest; None without experts."""
    return max(map(imbalance, load.values()), default=None)
