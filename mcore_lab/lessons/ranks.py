"""What lessons have in common: even shares, a row from each rank, and how far numbers differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_lab.errors import ConfigError
from mcore_lab.report.tables import print_table


def require_shared(settings: Any, name: str, among: int, what: str) -> None:
    """Raise ConfigError unless a setting can be cut into as many equal parts as `what` says."""
    value = getattr(settings, name)
    if value % among:
        raise ConfigError(
            f"{what} cannot share --{name.replace('_', '-')} {value} evenly; "
            f"{-(-value // among) * among} would do"
        )


def rows_of_all(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's row, in their order; each rank calls this."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, numbers with three digits."""
    print_table(list(rows[0]), [[_short(value) for value in row.values()] for row in rows])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def largest_difference(ours: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    """Return the largest difference of pairs of tensors, relative to the largest number of each."""
    differences = [0.0]
    for one, other in zip(ours, expected, strict=True):
        assert one is not None and other is not None
        largest = other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)
        differences.append(float((one - other).abs().max() / largest))
    return max(differences)
