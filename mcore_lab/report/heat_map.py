"""A heat map of verdicts: layers by kinds of parameter, coloured by error over tolerance."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Verdict = Mapping[str, Any]
Cells = dict[str, dict[str, list[Verdict]]]
"""The verdicts of each cell, by row and column."""

LEVELS = (-4, -3, -2, -1, 0, 1, 2, 4)
"""Decimal logarithms of error over tolerance at which the colour changes; above 0 is off."""
_MOST_LINES = 12
"""Of what is shown of a cell's tensors under the mouse."""

_LAYER = re.compile(r"^(mtp\.)?(?:.*?\.)?layers\.(\d+)\.?(.*)$")
_SUFFIX = re.compile(r"(^|[._])(weight|bias)$")
_INSIDE = re.compile(r"^(transformer_layer|mtp_model_layer|self_attention|mlp)\.(?=.)")
_EXPERT = re.compile(r"(?:(?:local_)?experts\.)+(?:\d+\.)?")


def strain(verdict: Verdict) -> float:
    """Return by how much of its tolerance a verdict is off: at most 1 is what rounding explains."""
    error, tolerance = float(verdict["error"]), float(verdict["tolerance"])
    if error == 0:
        return 0.0
    return error / tolerance if tolerance and not math.isnan(error) else math.inf


def level(strained: float) -> int:
    """Return the number of the colour that a strain is shown in."""
    return sum(strained > 10.0**edge for edge in LEVELS)


def short(strained: float) -> str:
    """Return the decimal logarithm of a strain in few characters; `=` is no difference at all."""
    if strained == 0:
        return "="
    return "∞" if math.isinf(strained) else f"{math.log10(strained):+.1f}"


def place(name: str) -> tuple[str, str]:
    """Return the row and the column of a tensor: its layer, and which of its parameters it is.

    Weights and biases of a module share a column, and so do all the experts of a layer.
    """
    layer = _LAYER.match(name)
    if layer is None:
        module, _, rest = name.removeprefix("decoder.").partition(".")
        return module, _SUFFIX.sub("", rest)
    inside = layer[3]
    while (stripped := _INSIDE.sub("", inside)) != inside:
        inside = stripped
    column = _SUFFIX.sub("", _EXPERT.sub("experts ", inside))
    return f"{'mtp' if layer[1] else 'layer'} {layer[2]}", column or "output"


def arranged(verdicts: Sequence[Verdict]) -> Cells:
    """Return the verdicts by row and column, both in the order in which they come."""
    cells: Cells = {}
    for verdict in verdicts:
        row, column = place(verdict["name"])
        cells.setdefault(row, {}).setdefault(column, []).append(verdict)
    return cells


def heat_map(verdicts: Sequence[Verdict]) -> str:
    """Return an HTML table of the verdicts: a row a layer, a column a kind of parameter."""
    cells = arranged(verdicts)
    of_layers = [row for name, row in cells.items() if _is_layer(name)]
    columns = list(dict.fromkeys(column for row in of_layers for column in row))
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "\n".join(_row(name, row, columns) for name, row in cells.items())
    return f'<table class="heat"><tr><td></td>{heads}</tr>\n{rows}\n</table>'


def legend() -> str:
    """Return the colours with what they mean, as HTML."""
    names = [f"≤ 10<sup>{edge}</sup>" for edge in LEVELS] + [f"&gt; 10<sup>{LEVELS[-1]}</sup>"]
    names[LEVELS.index(0)] = "≤ 1"
    boxes = "".join(f'<span class="l{n}">{name}</span>' for n, name in enumerate(names))
    explained = "In a cell is its decimal logarithm, = where there is no difference at all."
    return f'<p class="legend">error / tolerance {boxes} framed: off. {explained}</p>'


def _is_layer(row: str) -> bool:
    return row.startswith(("layer ", "mtp "))


def _row(name: str, row: Mapping[str, Sequence[Verdict]], columns: Sequence[str]) -> str:
    if _is_layer(name):
        inside = "".join(_cell(row.get(column, ()), "td") for column in columns)
    else:
        alone = "".join(_cell(verdicts, "div", column) for column, verdicts in row.items())
        inside = f'<td colspan="{max(1, len(columns))}"><div class="alone">{alone}</div></td>'
    return f'<tr><th scope="row">{escape(name)}</th>{inside}</tr>'


def _cell(verdicts: Sequence[Verdict], tag: str, label: str = "") -> str:
    if not verdicts:
        return f"<{tag}></{tag}>"
    ordered = sorted(verdicts, key=strain, reverse=True)
    worst = strain(ordered[0])
    is_off = " off" if not all(verdict["passed"] for verdict in verdicts) else ""
    told = escape("\n".join(_lines(ordered)))
    text = f"{escape(label)} {short(worst)}".strip()
    return f'<{tag} class="l{level(worst)}{is_off}" title="{told}">{text}</{tag}>'


def _lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    for verdict in verdicts[:_MOST_LINES]:
        ratio = verdict["ratio"]
        yield f"{verdict['name']}: error {float(verdict['error']):.3g}, tolerance " + (
            f"{float(verdict['tolerance']):.3g}"
            + ("" if ratio is None else f", norm ratio {float(ratio):.7g}")
            + (f" ({verdict['note']})" if verdict["note"] else "")
        )
    if len(verdicts) > _MOST_LINES:
        yield f"… and {len(verdicts) - _MOST_LINES} that are nearer"
