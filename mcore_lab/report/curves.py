"""A run's curves: loss, gradient norm and throughput by step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mcore_lab.report.divergence_plot import require_matplotlib
from mcore_lab.report.svg import BLUE, VERMILION

_PANELS = {
    "loss": "loss (nats a token)",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}
_FEW = 40
"""Steps up to which each is marked with a point."""


def curves_svg(
    metrics: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> str:
    """Return an SVG of the lines of a run's `metrics.jsonl`, and of its validations if there are.

    Raises BackendError where matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Words stay words; what is drawn of equal numbers is equal.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mcore_lab"}):
        figure = Figure(figsize=(12.4, 3.1), layout="constrained")
        steps = [line["step"] for line in metrics]
        for panel, (name, title) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
            values = [float(line[name]) for line in metrics]
            marker = "." if len(steps) <= _FEW else ""
            panel.plot(steps, values, color=BLUE, lw=1.4, marker=marker, label="training")
            if name == "loss" and validations:
                at = [line["step"] for line in validations]
                losses = [line["valid_loss"] for line in validations]
                panel.plot(at, losses, color=VERMILION, lw=0, marker="o", ms=5, label="validation")
                panel.legend(frameon=False)
            if name == "tokens_per_second":
                panel.set_ylim(bottom=0)
            panel.set_title(title, loc="left", fontsize=11)
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="#e6ebf0")
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nothing)
    # A page has the picture itself, without what a file of its own begins with.
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]
