"""What a person sees of a run: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PROGRAM = """
from mcore_lab.training.console import Console
from mcore_lab.training.metrics import StepMetrics

def step(number):
    return StepMetrics(step=number, loss=2.5, grad_norm=0.25, lr=1e-3, step_seconds=0.5,
                       tokens_per_second=12345.6, peak_memory_bytes=1)

with Console(speaks={speaks}) as console:
    console.begin({first}, 10)
    console.say("[x] a line that is not markup")
    for number in range({first} + 1, 11):
        console.step(step(number))
{after}
"""


def program(speaks: bool = True, first: int = 8, after: str = "") -> list[str]:
    text = PROGRAM.format(speaks=speaks, first=first, after=after)
    return [sys.executable, "-c", text]


def in_a_pipe(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Return the exit status and everything that was written to the terminal."""
    terminal, end = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, env=environment, stdin=end, stdout=end, stderr=end)
    os.close(end)
    seen = b""
    try:
        while part := os.read(terminal, 4096):
            seen += part
    except OSError:
        pass  # What reading says when the program has gone.
    finally:
        os.close(terminal)
    return process.wait(timeout=60), seen.decode()


def test_a_pipe_gets_plain_lines_and_each_step_is_one() -> None:
    assert in_a_pipe(program()).splitlines() == [
        "[x] a line that is not markup",
        "step  9/10  loss 2.5000  12,346 tokens/s  grad norm 0.2500  lr 1.00e-03",
        "step 10/10  loss 2.5000  12,346 tokens/s  grad norm 0.2500  lr 1.00e-03",
    ]


def test_a_console_that_does_not_speak_says_nothing() -> None:
    assert in_a_pipe(program(speaks=False)) == ""


def test_a_terminal_gets_a_bar_with_the_loss_and_the_speed() -> None:
    status, seen = on_a_terminal(program())
    assert status == 0
    assert "\x1b[" in seen and "10/10" in seen
    assert "loss 2.5000" in seen and "12,346 tokens/s" in seen
    assert "[x] a line that is not markup" in seen
    assert "grad norm" not in seen


def test_the_terminals_cursor_is_given_back_when_a_run_fails() -> None:
    hide, show = "\x1b[?25l", "\x1b[?25h"
    status, seen = on_a_terminal(program(after="    raise SystemExit(3)"))
    assert status == 3
    assert seen.rindex(show) > seen.rindex(hide)
