"""A page of documentation, read: its blocks, and what it says of each statement of them.

A block of Python says in a comment above it where it runs: `<!-- ranks: 4, tp: 2, cp: 2 -->`; with
`alone` it makes its process groups itself, without a comment it has one rank. Names carry through a
section, those of `<!-- imports -->` through the page. What follows a statement is held against it:

    expression  # -> value                       the same on every rank
    expression  # -> value | value               rank by rank
    statement  # raises ValueError: its words    `...` stands for anything
    statement  # 0.16                            runs on 0.16 only, and fails on any other version
    expression  # 0.16 -> value, or # 0.16 raises ..., each on its line

Lines that go on with `#` and three spaces belong to the one before.
"""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mcore_lab.layout import ParallelLayout

VERSION = ".".join(importlib.metadata.version("megatron-core").split(".")[:2])

_FENCE = re.compile(r"```(\w*)")
_HEADING = re.compile(r"## (.*)")
_WHERE = re.compile(r"<!-- (.*) -->")
_EXPECTED = re.compile(r"#\s*(?P<version>0\.\d+)?\s*(?P<kind>->|raises)?\s*(?P<text>.*)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    line: int
    """Of the page, where its first line of code is."""
    section: str
    language: str
    where: dict[str, str]
    code: str

    @property
    def ranks(self) -> int:
        """The ranks that it runs on."""
        return int(self.where.get("ranks", 1))

    @property
    def is_script(self) -> bool:
        """Whether it is a whole program, to be run as a file."""
        return self.language == "python" and 'if __name__ == "__main__":' in self.code

    @property
    def is_alone(self) -> bool:
        """Whether it makes its process groups itself."""
        return "alone" in self.where

    @property
    def layout(self) -> ParallelLayout:
        """The layout whose groups are there when it runs."""
        sizes = {k: int(v) for k, v in self.where.items() if v and k != "ranks"}
        return ParallelLayout().resized(**sizes)


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    section, said = "", ""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if fence := _FENCE.fullmatch(line):
            inside = [text for _, text in itertools.takewhile(lambda at: at[1] != "```", lines)]
            found.append(
                Block(
                    line=number + 1,
                    section=section,
                    language=fence[1],
                    where=_where(said),
                    code="\n".join(inside),
                )
            )
            said = ""
        elif heading := _HEADING.fullmatch(line):
            section = heading[1]
        elif comment := _WHERE.fullmatch(line):
            said = comment[1]
    return found


def _where(text: str) -> dict[str, str]:
    words = [word.partition(":") for word in text.split(",") if word.strip()]
    return {name.strip(): value.strip() for name, _, value in words}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a page says of a statement, on one version or on all."""

    version: str = ""
    """The only one that it is said of; of all, if empty."""
    kind: str = ""
    """`->`, `raises` or `fails`; that it runs, if empty."""
    text: str = ""
    """The value, or the error."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement of a block, and what the page says of it."""

    line: int
    source: str
    is_expression: bool
    expected: tuple[Expected, ...]

    def here(self) -> Expected:
        """Return what is expected on the installed version: that it fails, if it is of others."""
        if not self.expected:
            return Expected()
        of_this = (said for said in self.expected if said.version in ("", VERSION))
        return next(of_this, Expected(kind="fails"))


def statements_of(block: Block) -> list[Statement]:
    """Return the statements of a block of Python."""
    lines = block.code.splitlines()
    body = ast.parse(block.code).body
    starts = [_first_line(node) - 1 for node in body] + [len(lines)]
    found = []
    for node, (first, following) in zip(body, itertools.pairwise(starts), strict=True):
        assert node.end_lineno is not None and node.end_col_offset is not None
        last = node.end_lineno - 1
        source, rest = (part.decode() for part in _cut(lines[last].encode(), node.end_col_offset))
        comments = [rest, *lines[last + 1 : following]]
        found.append(
            Statement(
                line=block.line + first,
                source="\n".join([*lines[first:last], source]),
                is_expression=isinstance(node, ast.Expr),
                expected=tuple(_expected(comments)),
            )
        )
    return found


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min(part.lineno for part in [node, *decorators])


def _cut(text: bytes, place: int) -> tuple[bytes, bytes]:
    return text[:place], text[place:]


def _expected(comments: list[str]) -> Iterator[Expected]:
    joined: list[str] = []
    for comment in comments:
        if comment.startswith("#   ") and joined:
            joined[-1] += " " + comment.lstrip("# ")
        else:
            joined.append(comment.strip())
    for comment in joined:
        said = _EXPECTED.fullmatch(comment)
        if said and (said["kind"] or (said["version"] and not said["text"])):
            yield Expected(
                version=said["version"] or "", kind=said["kind"] or "", text=said["text"].strip()
            )


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a `console` block, each with what the page says that it prints."""
    parts = re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]
    pairs = [part.partition("\n") for part in parts]
    return [(command.strip(), printed) for command, _, printed in pairs]
