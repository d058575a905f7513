"""The losses of several runs of one task over each other, and how far each is from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mcore_lab.report.divergence_plot import require_matplotlib

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
_DASHES = ("-", "--", ":", "-.")
_SMALLEST = 1e-8


def plot_losses(file: Path, families: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw a column for each family of runs into an SVG, PNG or PDF file.

    Above are a family's losses in nats, by the names of its runs, and below their differences from
    the first. Raises BackendError without matplotlib, and OSError.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6 * len(families), 6.5), layout="constrained")
    axes = figure.subplots(
        2, len(families), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2)
    )
    most = _SMALLEST
    for (above, below), (family, runs) in zip(axes.T, families.items(), strict=True):
        (first, *_) = runs.values()
        for number, (name, losses) in enumerate(runs.items()):
            look = {
                "color": _COLOURS[number % len(_COLOURS)],
                "ls": _DASHES[number % len(_DASHES)],
                "lw": 2.5 if number == 0 else 1.3,
            }
            steps = range(1, len(losses) + 1)
            above.plot(steps, losses, label=name, **look)
            if number:
                apart = [abs(a - b) for a, b in zip(losses, first, strict=True)]
                # Not clipped: a difference of 0 lies on the axis itself.
                below.plot(steps, apart, label=name, clip_on=False, **look)
                most = max(most, *apart)
        above.set_yscale("log")
        above.set_title(f"{family}: loss (nats a token)", loc="left")
        below.set_yscale("symlog", linthresh=_SMALLEST)
        below.set_title("difference from one rank (nats)", loc="left")
        below.set_xlabel("step")
        above.legend(frameon=False)
        for panel in (above, below):
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelleft=True)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 0].set_ylim(0, 3 * most)
    figure.savefig(file, dpi=150)
