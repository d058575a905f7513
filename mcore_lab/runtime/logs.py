"""Each rank's log: what Megatron-Core, torch and Python's warnings have to say."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path
from typing import Self

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_HELD_RECORDS = 10_000


class RankLog:
    """Holds this rank's log records back until the run has a folder, then writes them there.

    What a person can do nothing about, such as the import warnings of optional libraries, is in
    the log and not in the terminal.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._held = logging.handlers.MemoryHandler(
            _HELD_RECORDS, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        root = logging.getLogger()
        for handler in list(root.handlers):
            root.removeHandler(handler)
        root.addHandler(self._held)
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)

    def write_to(self, folder: Path) -> None:
        """Write this rank's log to `folder/rank-N.log` from now on, with what was held back."""
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{self._rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORMAT))
        self._held.setTarget(file)
        self._held.flush()
        root = logging.getLogger()
        root.removeHandler(self._held)
        root.addHandler(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Write what is left and let the log go."""
        logging.captureWarnings(False)
        root = logging.getLogger()
        for handler in list(root.handlers):
            handler.flush()
            handler.close()
            root.removeHandler(handler)
