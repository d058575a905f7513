"""Two runs as a picture: their curves over each other, and the difference beneath."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab.errors import BackendError
from mcore_lab.report.divergence import Curve, Divergence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#2b7bba", "#d94801", "#5b6b7b"
_TITLES = {"loss": "loss (nats a token)", "grad_norm": "gradient norm"}
_SMALLEST = 1e-9
"""Relative differences below this are drawn towards zero on a linear axis."""


def require_matplotlib() -> None:
    """Raise BackendError if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BackendError("a plot needs matplotlib: pip install 'mcore-lab[plot]'") from None


def plot_divergence(file: Path, found: Divergence, names: Sequence[str]) -> None:
    """Draw two runs, called `names`, into an SVG, PNG or PDF file. Raises OSError, ValueError."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, len(found.curves), sharex=True, squeeze=False, height_ratios=(3, 2))
    for column, curve in enumerate(found.curves):
        _draw_values(axes[0, column], curve, names)
        _draw_differences(axes[1, column], curve)
        for panel in axes[:, column]:
            _mark_divergence(panel, curve)
    figure.savefig(file, dpi=150)


def _draw_values(panel: Axes, curve: Curve, names: Sequence[str]) -> None:
    # The first run is broad and pale, so that the second shows over it where they are the same.
    panel.plot(curve.steps, curve.values[0], color=_BLUE, lw=4, alpha=0.45, label=names[0])
    panel.plot(curve.steps, curve.values[1], color=_ORANGE, lw=1.3, label=names[1])
    panel.set_title(_TITLES[curve.name], loc="left")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_differences(panel: Axes, curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    # Not clipped: a difference of 0 lies on the axis itself.
    panel.plot(curve.steps, curve.differences, color=_GREY, marker=".", ms=4, clip_on=False)
    panel.axhline(curve.tolerance, color=_ORANGE, ls="--", lw=1)
    panel.annotate(
        f"tolerance {curve.tolerance:.0e}",
        (1, curve.tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=_ORANGE,
    )
    panel.set_yscale("symlog", linthresh=_SMALLEST)
    panel.set_ylim(0, 3 * panel.get_ylim()[1])
    panel.set_title("relative difference", loc="left")
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.spines[["top", "right"]].set_visible(False)


def _mark_divergence(panel: Axes, curve: Curve) -> None:
    if (step := curve.first_beyond) is None:
        return
    panel.axvline(step, color=_ORANGE, lw=1, ls=":")
    panel.annotate(
        f"step {step}",
        (step, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 5),
        textcoords="offset points",
        color=_ORANGE,
    )
