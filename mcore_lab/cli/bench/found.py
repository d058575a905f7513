"""What a benchmark has found, told in one way by all of them: with the machine it was found on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mcore_lab.bench.machine import Machine
from mcore_lab.report.tables import print_json


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the `measure` of a benchmark's module returns."""

    values: Mapping[str, Any]
    """What `--json` prints."""
    as_json: bool
    tell: Callable[[], None]
    """Prints it for a person."""
    nproc: int | None = None
    """Ranks, where one number of them was measured."""

    def show(self, machine: Machine) -> None:
        """Print what was found, and on what: its two lines, or `machine` of the JSON."""
        threads = None
        if self.nproc is not None:
            from mcore_lab.runtime.device import threads_per_rank

            threads = threads_per_rank(self.nproc)
        if self.as_json:
            on = asdict(machine) | {"threads_per_rank": threads}
            print_json({**self.values, "machine": on})
            return
        self.tell()
        print("", *machine.lines(threads), sep="\n")
