"""A page of documentation, run: its Python on real ranks, its commands in this process."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import Block, Expected, Statement, blocks_of, statements_of
from torch.distributed.checkpoint import CheckpointException

from mcore_lab import cli, cpu
from mcore_lab.runtime import launch, model_parallel


def run_python(page: Path, ranks: int, folder: Path) -> dict[int, list[str]]:
    """Run the blocks of so many ranks in one launch; return what is not so, by a block's line."""
    blocks = [
        block for block in blocks_of(page) if block.language == "python" and not block.is_script
    ]
    imports = [block.code for block in blocks if "imports" in block.where]
    # Groups are made once for each layout; the sort is stable, so that sections stay in order.
    here = sorted(
        (block for block in blocks if block.ranks == ranks and "imports" not in block.where),
        key=lambda block: (block.is_alone, str(block.layout)),
    )
    found: dict[int, list[str]] = {block.line: [] for block in here}
    for of_rank in launch(_run_on_rank, ranks, "\n".join(imports), here, folder, timeout=120):
        for line, wrong in of_rank.items():
            found[line] += wrong
    return found


def _run_on_rank(imports: str, blocks: list[Block], folder: Path) -> dict[int, list[str]]:
    cpu.enable()
    os.chdir(folder)
    found: dict[int, list[str]] = {}
    spaces: dict[tuple[str, str], dict[str, Any]] = {}
    groups, built = contextlib.ExitStack(), None
    with groups:
        for block in blocks:
            layout = None if block.is_alone else block.layout
            if layout != built or layout is None:
                groups.close()
                built = layout
                if layout is not None:
                    groups.enter_context(model_parallel(layout))
            key = block.section, str(layout)
            if key not in spaces:
                spaces[key] = {"__name__": "page"}
                exec(imports, spaces[key])
            found[block.line] = list(_not_so(block, spaces[key]))
    return found


def _not_so(block: Block, names: dict[str, Any]) -> Iterator[str]:
    for statement in statements_of(block):
        wrong = _hold(statement, names, block.ranks)
        if wrong:
            rank = os.environ["RANK"]
            yield f"line {statement.line}, rank {rank}: {statement.source}\n  {wrong}"


def _hold(statement: Statement, names: dict[str, Any], ranks: int) -> str:
    """Run a statement, and say in what it is not as the page says."""
    expected = statement.here()
    try:
        value = _run(statement, names)
    except (Exception, CheckpointException) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        as_said = expected.kind == "raises" and _matches(said, expected.text)
        return "" if as_said or expected.kind == "fails" else f"raises {said}; {_says(expected)}"
    if expected.kind in ("fails", "raises"):
        return f"raises nothing, but is {value!r:.200}; {_says(expected)}"
    if not expected.kind:
        return ""
    by_rank = expected.text.split(" | ")
    text = by_rank[int(os.environ["RANK"])] if len(by_rank) == ranks else expected.text
    as_said = _same(value, eval(text, dict(names)))
    return "" if as_said else f"is {_plain(value)!r:.400}; {_says(expected)}"


def _says(expected: Expected) -> str:
    return f"the page says: {expected.kind or 'runs'} {expected.text}".rstrip()


def _run(statement: Statement, names: dict[str, Any]) -> Any:
    if statement.is_expression:
        return eval(f"(\n{statement.source}\n)", names)
    exec(statement.source, names)
    return None


def _matches(said: str, text: str) -> bool:
    parts = [re.escape(part) for part in " ".join(text.split()).split("...")]
    return re.fullmatch(".*".join(parts), said, flags=re.DOTALL) is not None


def _same(value: Any, wanted: Any) -> bool:
    """Say whether a value is the one of the page: numbers to six digits, tensors as lists."""
    value, wanted = _plain(value), _plain(wanted)
    if isinstance(value, (list, tuple)):
        return (
            isinstance(wanted, type(value))
            and len(value) == len(wanted)
            and all(map(_same, value, wanted))
        )
    if isinstance(value, float) and isinstance(wanted, (int, float)):
        return math.isclose(value, wanted, rel_tol=1e-6, abs_tol=1e-6)
    return bool(type(value) is type(wanted) and value == wanted)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return tuple(value) if isinstance(value, torch.Size) else value


def run_script(code: str, folder: Path) -> str:
    """Run a program of a page as a file in `folder`; return what it printed."""
    (folder / "script.py").write_text(code, encoding="utf-8")
    words = [sys.executable, "script.py"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def type_line(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Type a line in a shell that is in `folder`; the programs are those of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
    )


def run_command(command: str) -> tuple[int, str]:
    """Run `mcore-lab ...` in this process; return its status and what it printed."""
    name, *words = shlex.split(command)
    assert name == "mcore-lab", command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = cli.main(words)
    return status, printed.getvalue()
