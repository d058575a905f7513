"""The verifier's findings as one page: what is off, and heat maps of layers by kinds of parameter.

What goes in is what `VerificationReport.as_json` returns; what comes out is HTML that needs no
other file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mcore_lab.report.heat_map import heat_map, legend, level, strain
from mcore_lab.report.html import facts, folded, table, title
from mcore_lab.report.page_style import PAGE

_MAPS = {
    "activation": ("Activations", "of the first micro-batch"),
    "gradient": ("Gradients", "of the first step, before they are clipped"),
    "weight": ("Weights", "after the last step, relative to how far training has moved them"),
}
_FIRST = 12
"""Of what is off, how much is shown unasked."""


def verification_page(report: Mapping[str, Any]) -> str:
    """Return a self-contained HTML page of a verification; see `VerificationReport.as_json`."""
    agree = [verdict for verdict in report["verdicts"] if verdict["passed"]]
    parts = [
        *_head(report),
        *_off(report["verdicts"]),
        *_kinds(report["kinds"]),
        *_losses(report["losses"]),
        *_heat_maps(report["verdicts"]),
        *_folded(f"{len(agree)} comparisons that agree", agree),
    ]
    name = escape(f"{report['recipe']} on {report['world_size']} ranks")
    return PAGE.format(title=name, body="\n".join(parts))


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    state, word = ("agrees", "agrees with") if report["passed"] else ("differs", "differs from")
    yield f'<header class="{state}"><h1>{escape(report["recipe"])} <b>{word}</b> one rank</h1>'
    yield f"<p>{escape(report['conclusion'])}</p>"
    if report["hints"]:
        yield f"<ul>{''.join(f'<li>{escape(hint)}</li>' for hint in report['hints'])}</ul>"
    sizes = report["layout"].items()
    known = {
        "layout": " ".join(key if size is True else f"{key}{size}" for key, size in sizes),
        "ranks": report["world_size"],
        "precision": report["precision"],
        "steps": report["steps"],
        "Megatron-Core": report["megatron_core"],
        "torch": report["torch"],
    }
    yield f"{facts(known)}</header>"


def _off(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if off := [verdict for verdict in verdicts if not verdict["passed"]]:
        yield title("What is off", "in the order in which it is computed: look at the first")
        yield _verdict_table(off[:_FIRST])
        yield from _folded(f"{len(off) - _FIRST} more that are off", off[_FIRST:])


def _kinds(kinds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield title("What was compared", "each kind with what is nearest to its tolerance")
    columns = ("kind", "comparisons", "off", "error", "tolerance", "error / tolerance", "where")
    yield table(columns, map(_kind_row, kinds))


def _kind_row(summary: Mapping[str, Any]) -> tuple[str, ...]:
    off = f"<b>{summary['off']}</b>" if summary["off"] else "0"
    _, where, *numbers = _shared_cells(summary["worst"])
    return escape(summary["kind"]), str(summary["comparisons"]), off, *numbers, where


def _losses(losses: Sequence[Sequence[Any]]) -> Iterator[str]:
    if losses:
        yield title("Loss", "mean of each step, in nats")
        rows = (_loss_row(step, *map(float, pair)) for step, pair in enumerate(losses, 1))
        yield table(("step", "one rank", "layout", "difference"), rows)


def _loss_row(step: int, one_rank: float, layout: float) -> tuple[str, ...]:
    return str(step), f"{one_rank:.9g}", f"{layout:.9g}", _number(layout - one_rank)


def _heat_maps(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield legend()
    for kind, (words, remark) in _MAPS.items():
        of_kind = [verdict for verdict in verdicts if verdict["kind"] == kind]
        if of_kind:
            # Gradients are judged from the last layer to the first; the maps run forward.
            forward = of_kind[::-1] if kind == "gradient" else of_kind
            yield title(words, remark)
            yield heat_map(forward)


def _folded(summary: str, verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if verdicts:
        yield folded(summary, _verdict_table(verdicts))


def _verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    columns = ("kind", "what", "error", "tolerance", "error / tolerance", "norm ratio")
    return table(columns, map(_verdict_row, verdicts))


def _verdict_row(verdict: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = "" if verdict["ratio"] is None else f"{float(verdict['ratio']):.6g}"
    return *_shared_cells(verdict), ratio


def _shared_cells(verdict: Mapping[str, Any]) -> tuple[str, ...]:
    note = f"<small>{escape(verdict['note'])}</small>" if verdict["note"] else ""
    names = escape(verdict["kind"]), escape(verdict["name"]) + note
    numbers = _number(verdict["error"]), _number(verdict["tolerance"])
    strained = strain(verdict)
    is_off = "" if verdict["passed"] else " off"
    return *names, *numbers, f'<i class="l{level(strained)}{is_off}">{_number(strained)}</i>'


def _number(value: Any) -> str:
    value = float(value)
    if value == 0:
        return "0"
    return f"{value:.2g}" if 0.01 <= abs(value) < 100 else f"{value:.1e}"
