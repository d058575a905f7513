"""The `mcore-lab` command: one module a command, imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from mcore_lab.errors import ConfigError, LabError, nearest

COMMANDS = {
    "run": "train a recipe, or give a lesson, on this machine's ranks",
    "check": "say whether a recipe's layout fits a number of ranks",
    "ranks": "show which rank is where, and what it holds",
    "new": "write a recipe module of your own, with its test",
    "recipes": "list the recipes and the lessons",
    "verify": "say whether a layout computes what one rank computes",
    "compare": "say from which step on two runs differ",
    "report": "make one page of a run: its curves, who held what, and what was traced",
    "sample": "go on with a text, or with tokens, from a checkpoint",
    "checkpoint": "look at checkpoints, see that they are whole, write them for others",
    "bench": "time launches, steps, checkpoints or collectives, beside what others take",
    "doctor": "say what this machine has, what that allows, and what is missing",
}
_OTHER_WORDS = {
    "train": "run",
    "list": "recipes",
    "generate": "sample",
    "prove": "verify",
    "test": "verify",
    "diff": "compare",
    "plot": "report",
    "init": "new",
    "version": "--version",
}
"""What people may type who know another tool, and what it is called here."""
_CLEAR_LINE, _SHOW_CURSOR = "\r\x1b[K", "\x1b[?25h"
_INTERRUPTED = 130
_READER_LEFT = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; what a person can put right is told in a line."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _command(words)
        sys.stdout.flush()
        return status
    except LabError as error:
        _leave_bar(_CLEAR_LINE)
        return _tell(str(error), words, error.exit_code)
    except KeyboardInterrupt:
        # The terminal has written ^C where the cursor was.
        _leave_bar("\n")
        return _tell("interrupted", words, _INTERRUPTED)
    except BrokenPipeError:
        # `mcore-lab … | head`: nothing more can be written, not by Python's last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_LEFT
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mcore_lab"):
            return _tell(_bug(error), words, 1)
        return _tell(f"{error}; `mcore-lab doctor` says how to add it", words, 2)
    except Exception as error:
        return _tell(_bug(error), words, 1)


def _command(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        from mcore_lab.version import installed_version

        print(f"mcore-lab {installed_version()}")
        return 0
    if name not in COMMANDS:
        other, there_is = _OTHER_WORDS.get(name), f"; there is {', '.join(COMMANDS)}"
        near = f"; did you mean {other}?" if other else nearest(name, COMMANDS)
        raise ConfigError(f"no command {name}{near or there_is}")
    status: int = importlib.import_module(f"{__name__}.{name}").main(words[1:])
    return status


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    return f"""\
usage: mcore-lab COMMAND [options]

Megatron-Core's parallelism on this machine, with GPUs or without.

{commands}

Each command has --json and --help. To begin:
  mcore-lab doctor
  mcore-lab run tp2_gpt --nproc 2
  mcore-lab run tp2_gpt --help        every option of a recipe, with its values"""


def _leave_bar(how: str) -> None:
    """Give back the cursor that a rank hid, which did not come to the end of its bar."""
    if sys.stdout.isatty():
        print(f"{how}{_SHOW_CURSOR}", end="", flush=True)


def _tell(message: str, words: Sequence[str], status: int) -> int:
    """Print an error for a person, and as JSON for a program that asked for it."""
    print(f"error: {message}", file=sys.stderr)
    if "--json" in words:
        from mcore_lab.report.tables import print_json

        print_json({"error": message})
    return status


def _bug(error: Exception) -> str:
    with tempfile.NamedTemporaryFile(
        mode="w", prefix="mcore-lab-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return (
        f"{type(error).__name__}: {error}\n"
        f"this is a bug in mcore_lab; the traceback is in {file.name}"
    )
