"""What the pages are put together from: titles, tables and what is folded away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def title(words: str, remark: str = "") -> str:
    """Return the title of a section, with a remark beside it."""
    return f"<h2>{words} <small>{remark}</small></h2>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells are HTML already."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="list"><tr>{head}</tr>\n{body}\n</table>'


def facts(named: Mapping[str, object]) -> str:
    """Return what is known of a thing, each with its name over it."""
    pairs = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd></div>"
        for name, fact in named.items()
    )
    return f"<dl>{''.join(pairs)}</dl>"


def folded(summary: str, content: str) -> str:
    """Return content that is shown when a person asks for it."""
    return f"<details><summary>{summary}</summary>{content}</details>"
