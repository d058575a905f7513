"""What a person sees of a run: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
PROGRAM = """
from mcore_lab.training.console import Console
from mcore_lab.training.metrics import StepMetrics

def step(number):
    return StepMetrics(step=number, loss=2.5, grad_norm=0.25, lr=1e-3, step_seconds=0.5,
                       tokens_per_second=12345.6, peak_memory_bytes=1, **{more})

with Console(speaks={speaks}) as console:
    console.begin({first}, 10)
    console.say("[x] a line that is not markup")
    for number in range({first} + 1, 11):
        console.step(step(number))
{after}
"""


MORE = {"tflops_per_rank": 412.34, "mfu": 0.4169, "expert_imbalance": 1.324}


def program(
    speaks: bool = True, first: int = 8, after: str = "", more: dict[str, float] | None = None
) -> list[str]:
    text = PROGRAM.format(speaks=speaks, first=first, after=after, more=more or {})
    return [sys.executable, "-c", text]


def in_a_pipe(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def on_a_terminal(
    command: list[str], width: int = 100, interrupt_at: bytes | None = None
) -> tuple[int, str]:
    """Return the exit status and everything that was written to the terminal.

    All processes are interrupted, as by Ctrl-C, when `interrupt_at` is to be seen.
    """
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        # Tests that run in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(end)
    seen = b""
    try:
        while part := os.read(terminal, 4096):
            seen += part
            if interrupt_at and interrupt_at in seen:
                os.killpg(process.pid, signal.SIGINT)
                interrupt_at = None
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


def test_a_pipes_line_ends_with_the_use_of_the_device_and_of_experts_where_they_are_known() -> None:
    (_, line) = in_a_pipe(program(first=9, more=MORE)).splitlines()
    assert line.endswith("lr 1.00e-03  412 TFLOP/s/rank  MFU 41.7%  expert imbalance 1.32")


def test_a_console_that_does_not_speak_says_nothing() -> None:
    assert in_a_pipe(program(speaks=False)) == ""


def test_a_terminal_gets_a_bar_with_the_loss_and_the_speed() -> None:
    status, seen = on_a_terminal(program())
    assert status == 0
    assert "\x1b[" in seen and "10/10" in seen
    assert "loss 2.5000" in seen and "12,346 tokens/s" in seen
    assert "[x] a line that is not markup" in seen
    assert "grad norm" not in seen


@pytest.mark.parametrize(
    ("width", "told", "left_out"),
    [
        (40, "loss 2.5000", "tokens/s"),
        (60, "12,346 tokens/s", "TFLOP/s"),
        (80, "412 TFLOP/s/rank", "MFU"),
        (120, "expert imbalance 1.32", None),
    ],
)
def test_a_bar_is_one_line_and_tells_what_there_is_room_for(
    width: int, told: str, left_out: str | None
) -> None:
    _, seen = on_a_terminal(program(more=MORE), width)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    lines = [line for line in re.split(r"[\r\n]+", drawn) if line.startswith("step")]
    assert told in lines[-1] and max(map(len, lines)) <= width
    assert left_out is None or left_out not in drawn
    assert "…" not in drawn


def test_the_terminals_cursor_is_given_back_when_a_run_fails() -> None:
    hide, show = "\x1b[?25l", "\x1b[?25h"
    status, seen = on_a_terminal(program(after="    raise SystemExit(3)"))
    assert status == 3
    assert seen.rindex(show) > seen.rindex(hide)


@pytest.mark.slow
def test_a_run_that_is_interrupted_gives_the_cursor_back_and_says_so_on_a_line_of_its_own(
    tmp_path: Path,
) -> None:
    """Takes 5 s: pytest -m slow tests/training/test_console.py."""
    words = ["-m", "mcore_lab", "run", "tp2_gpt", "--run-dir", str(tmp_path / "run")]
    small = ["--model.hidden-size", "32", "--model.num-layers", "2", "--training.steps", "100000"]
    status, seen = on_a_terminal([sys.executable, *words, *small], interrupt_at=b"loss")
    assert status == 130
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert seen.rindex(show) > seen.rindex(hide)
    assert seen.endswith(f"\n{show}error: interrupted\r\n")
