"""The bandwidth of collectives by their size: a panel for each kind of groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab.report.divergence_plot import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = (
    ("#332288", "o"),
    ("#88CCEE", "s"),
    ("#44AA99", "^"),
    ("#117733", "v"),
    ("#999933", "D"),
    ("#CC6677", "P"),
    ("#882255", "X"),
    ("#AA4499", "<"),
    ("#6B5B3E", "*"),
)
"""Colours told apart by those who see no difference of red and green, and a marker beside each.

Source: the "muted" scheme of https://personal.sron.nl/~pault, its sand darkened for a white ground.
"""
_BETWEEN = ((10, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (1e3, (1.0, 2.0, 5.0)), (math.inf, (1.0,)))
"""Multiples of powers of ten that have a tick, on an axis that spans less than so many times."""
_MOST_COLUMNS = 3
_MOST_TICKS = 6
_MARGIN = 1.5
"""Of sizes, beside the first and the last: a power of two that one is near has its tick there."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The collectives of one kind of groups."""

    title: str
    curves: Mapping[str, Sequence[tuple[int, float]]]
    """For each collective its points: bytes, and bytes a second."""


def plot_bandwidths(
    file: Path, title: str, panels: Sequence[Panel], collectives: Sequence[str]
) -> None:
    """Draw the panels into an SVG, PNG or PDF file, on the same axes. Raises OSError.

    `collectives` are all that there might be: each has its colour whatever others are drawn.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(len(panels), _MOST_COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 2.4, 3.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    styles = dict(zip(collectives, itertools.cycle(_STYLES), strict=False))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, styles)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    sizes = {size for panel in panels for curve in panel.curves.values() for size, _ in curve}
    _scale(grid[0, 0], sizes)
    for place, axes in enumerate(grid.flat[: len(panels)]):
        is_lowest = place + columns >= len(panels)
        axes.tick_params(axis="x", labelbottom=is_lowest)
        if is_lowest:
            axes.set_xlabel("size of the larger buffer of a rank")
    for axes in grid[:, 0]:
        axes.set_ylabel("bus bandwidth (GB/s)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(file, dpi=150)


def _draw(axes: Axes, panel: Panel, styles: Mapping[str, tuple[str, str]]) -> None:
    for name, curve in panel.curves.items():
        colour, marker = styles[name]
        sizes, bandwidths = zip(*curve, strict=True)
        gigabytes = [bandwidth / 1e9 for bandwidth in bandwidths]
        axes.plot(sizes, gigabytes, color=colour, marker=marker, ms=6, lw=1.4, label=name)
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea", lw=0.7)
    axes.set_axisbelow(True)


def _scale(axes: Axes, sizes: Collection[int]) -> None:
    """Make the axes, which the panels share, logarithmic: of two in bytes, of ten in GB/s."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / _MARGIN, max(sizes) * _MARGIN)
    # What groups of three ranks have in the place of a power of two has its tick.
    ticks = sorted({2 ** round(math.log2(size)) for size in sizes})
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // _MOST_TICKS)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: in_units(size)))
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    # The fewer powers of ten there are, the more ticks are between them.
    between = next(subs for span, subs in _BETWEEN if highest < span * lowest)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda bandwidth, _: _positional(bandwidth)))


def _positional(number: float) -> str:
    return f"{number:.12f}".rstrip("0").rstrip(".")


def in_units(size: float) -> str:
    """Return bytes as a person reads them: `64 KiB`."""
    place = 0
    while size >= 1024 and place < len(_UNITS) - 1:
        size, place = size / 1024, place + 1
    return f"{size:.4g} {_UNITS[place]}"
