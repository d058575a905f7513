"""The matrix of a sweep: a square a layout, by model and ranks, coloured by its outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_SQUARE, _GAP, _LEFT, _TOP, _WIDE, _LINE = 12, 3, 90, 76, 46, 18
_COLOURS = {"passed": "#2f7ebc", "wrong": "#d95f02", "failed": "#222222"}
"""Told apart by those who see no difference of red and green, and in print."""
_WORDS = {
    "passed": "computes what one rank computes",
    "wrong": "does not",
    "failed": "did not run to its end",
}


def sweep_matrix_svg(sweeps: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG of sweeps, each as `Sweep.as_json` gives it: a block a version and model."""
    parts: list[str] = []
    y = _TOP
    for sweep in sweeps:
        for recipe, counts in sweep["summary"].items():
            outcomes = [one for one in sweep["outcomes"] if one["recipe"] == recipe]
            title = f"Megatron-Core {sweep['megatron_core']}, {recipe}: {len(outcomes)} layouts"
            told = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
            told += " by the rules" if told.endswith("refused") else ""
            parts.append(_text(12, y, title, weight=600))
            parts.append(_text(12, y + _LINE, told))
            y += _LINE + 10
            for world in sorted({one["world_size"] for one in outcomes}):
                of_world = [one for one in outcomes if one["world_size"] == world]
                parts.append(_text(12, y + _SQUARE - 2, f"{world} rank{'s' * (world > 1)}"))
                parts += [_square(number, y, one) for number, one in enumerate(of_world)]
                y += -(-len(of_world) // _WIDE) * (_SQUARE + _GAP) + 6
            y += 26
    width = _LEFT + _WIDE * (_SQUARE + _GAP) + 12
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" '
        f'viewBox="0 0 {width} {y}" font-family="ui-sans-serif, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(12, 24, "Every layout against one rank", size=16, weight=600),
        *_legend(),
    ]
    return "\n".join([*head, *parts, "</svg>\n"])


def _square(number: int, top: int, outcome: Mapping[str, Any]) -> str:
    x = _LEFT + number % _WIDE * (_SQUARE + _GAP)
    y = top + number // _WIDE * (_SQUARE + _GAP)
    says = escape(outcome["layout"] or "one rank")
    if outcome["status"] != "passed":
        says = escape(outcome["conclusion"])
    return (
        f'<rect x="{x}" y="{y}" width="{_SQUARE}" height="{_SQUARE}" rx="2" '
        f'fill="{_COLOURS[outcome["status"]]}"><title>{says}</title></rect>'
    )


def _legend() -> list[str]:
    parts, x = [], 12
    for status, colour in _COLOURS.items():
        parts.append(f'<rect x="{x}" y="38" width="{_SQUARE}" height="12" rx="2" fill="{colour}"/>')
        parts.append(_text(x + _SQUARE + 5, 48, _WORDS[status]))
        x += _SQUARE + 30 + 7 * len(_WORDS[status])
    return parts


def _text(x: int, y: int, words: str, *, size: int = 12, weight: int = 400) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}">{escape(words)}</text>'
