"""How long it takes until ranks stand in a working process group, by each way to start them."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mcore_lab.bench.stand import STARTED
from mcore_lab.errors import RankFailedError

WAYS = {
    "mcore-lab": "the launcher of `mcore-lab run`: imports once, then ranks are forked",
    "torchrun": "each rank is a new process that imports for itself",
    "spawn": "torch.multiprocessing.spawn, the same from Python",
    "launch()": "the launcher of `mcore-lab run` in a program that has the imports behind it",
}
"""The ways to start ranks. All but the last are measured from the start of a command."""
_OURS = "mcore-lab"
_LIMIT_SECONDS = 600
_SECONDS_TO_END = 10
_SAID = "stderr"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """How long a way takes to so many ranks, until all have the sum of their first all-reduce."""

    way: str
    nproc: int
    rounds: int
    seconds: float
    """The median."""
    least: float
    most: float
    ratio: float
    """The median by that of `mcore-lab`."""


def measure(nprocs: Sequence[int], rounds: int) -> list[Launched]:
    """Start ranks in all ways, one after the other, `rounds` times; every second round backwards.

    They join their process group as a recipe does, with Megatron-Core imported. Raises
    RankFailedError with what the command says if one fails.
    """
    cases = [(nproc, way) for nproc in nprocs for way in WAYS]
    took: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for turn in range(rounds):
        for nproc, way in cases if turn % 2 == 0 else cases[::-1]:
            took[nproc, way].append(seconds_to_stand(way, nproc))
    medians = {case: statistics.median(seconds) for case, seconds in took.items()}
    return [
        Launched(
            way=way,
            nproc=nproc,
            rounds=rounds,
            seconds=medians[nproc, way],
            least=min(took[nproc, way]),
            most=max(took[nproc, way]),
            ratio=medians[nproc, way] / medians[nproc, _OURS],
        )
        for nproc, way in cases
    ]


def seconds_to_stand(way: str, nproc: int) -> float:
    """Start ranks in one way, and return how long it took until the last of them stood."""
    from mcore_lab.runtime.signals import sigterm_raises

    with tempfile.TemporaryDirectory(prefix="mcore_lab-") as name:
        folder = Path(name)
        with (folder / _SAID).open("w") as said:
            started = time.monotonic()
            # A session of its own, all of which can be ended.
            process = subprocess.Popen(
                _command(way, nproc, folder),
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
            try:
                with sigterm_raises():
                    status = process.wait(_LIMIT_SECONDS)
            finally:
                _end(process)
        if status:
            lines = (folder / _SAID).read_text(errors="replace").strip().splitlines() or [""]
            raise RankFailedError(f"{way} with {nproc} ranks ended with {status}: {lines[-1]}")
        with suppress(FileNotFoundError):
            started = float((folder / STARTED).read_text())
        return max(float((folder / str(rank)).read_text()) for rank in range(nproc)) - started


def _command(way: str, nproc: int, folder: Path) -> list[str]:
    stand = ["-m", "mcore_lab.bench.stand", way, str(nproc), str(folder)]
    if way != "torchrun":
        return [sys.executable, *stand]
    from mcore_lab.runtime.ports import free_port

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    return [sys.executable, *torchrun, "--master-port", str(free_port()), *stand]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command with all that it has started, if it has not ended by itself."""
    if process.poll() is not None:
        return
    # torchrun's ranks are in sessions of their own, and it ends them itself.
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
