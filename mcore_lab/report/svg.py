"""What the pictures share: colours that everyone tells apart, and the few shapes of SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

SKY, ORANGE, GREEN, YELLOW = "#56b4e9", "#e69f00", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE, BLACK = "#0072b2", "#d55e00", "#cc79a7", "#000000"
"""Okabe and Ito's palette: told apart by people of every colour vision."""
INK, FAINT, LINE, WAIT = "#16222e", "#5b6b7b", "#cbd5e1", "#d9dee4"


def picture(width: float, height: float, title: str, parts: Iterable[str], remark: str = "") -> str:
    """Return an SVG with a title, and a remark under it, on white: legible on any ground."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="ui-sans-serif, system-ui, sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(title)}">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(12, 24, title, size=16, weight=600),
        *([text(12, 44, remark, fill=FAINT)] if remark else []),
    ]
    return "\n".join([*head, *parts, "</svg>\n"])


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: float = 12,
    weight: int = 400,
    fill: str = INK,
    anchor: str = "start",
) -> str:
    """Return words that begin, end or have their `middle` at a place."""
    more = f' font-weight="{weight}"' * (weight != 400)
    more += f' text-anchor="{anchor}"' * (anchor != "start")
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{more}'
    return f"<text {place}>{escape(words)}</text>"


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    *,
    title: str = "",
    stroke: str = "none",
    radius: float = 0,
) -> str:
    """Return a rectangle, with what a mouse over it is told."""
    shape = (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{height:.2f}" '
        f'fill="{fill}" stroke="{stroke}"' + f' rx="{radius:g}"' * bool(radius)
    )
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def line(x1: float, y1: float, x2: float, y2: float, stroke: str = LINE, width: float = 1) -> str:
    """Return a straight line."""
    return (
        f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" '
        f'stroke="{stroke}" stroke-width="{width:g}"/>'
    )


def legend(x: float, y: float, names: Sequence[tuple[str, str]]) -> tuple[list[str], float]:
    """Return boxes of colours with their names from `x` on, and where they end."""
    parts = []
    for name, colour in names:
        parts.append(box(x, y - 10, 12, 12, colour, stroke=FAINT, radius=2))
        parts.append(text(x + 17, y, name))
        x += 17 + width_of(name) + 16
    return parts, x


def width_of(words: str, size: float = 12) -> float:
    """Return about how wide words are, rather more than less."""
    return len(words) * size * 0.56


def ticks(most: float, count: int = 8) -> list[float]:
    """Return round numbers from 0 to `most`, about `count` of them."""
    if not most > 0:
        return [0.0]
    rough = most / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
    return [step * n for n in range(int(most / step + 1e-9) + 1)]


def amount(number: float, unit: str = "B") -> str:
    """Return a number of bytes as a person reads it, in steps of a thousand: `1.5 MB`."""
    prefixes = ["", "k", "M", "G", "T"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}{unit}"
