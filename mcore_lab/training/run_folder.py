"""The folder of a run: what ran, what was measured, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_lab.errors import RunFolderError
from mcore_lab.report.rank_trace import RankTrace

if TYPE_CHECKING:
    from mcore_lab.training.metrics import StepMetrics

_RECIPE, _METRICS, _VALIDATION = "recipe.toml", "metrics.jsonl", "validation.jsonl"
_CHECKPOINTS, _LOGS, _LAUNCH, _TRACE = "checkpoints", "logs", ".launch", "trace"
TENSORBOARD_FOLDER = "tensorboard"
_LATEST = f"{_CHECKPOINTS}/latest_checkpointed_iteration.txt"
_WRITTEN = (
    _RECIPE,
    _METRICS,
    _VALIDATION,
    f"{_CHECKPOINTS}/step-*",
    f"{_CHECKPOINTS}/.step-*",
    _LATEST,
    _LAUNCH,
    f"{_LOGS}/rank-*.log",
    f"{_TRACE}/rank-*.json",
    f"{_TRACE}/chrome_trace.json",
    f"{_TRACE}/*.svg",
    f"{TENSORBOARD_FOLDER}/events.out.tfevents.*",
    "report.html",
)
"""What a run writes, and all that `--fresh` removes."""


class RunFolder:
    """`recipe.toml`, `metrics.jsonl`, `validation.jsonl`, `checkpoints/`, `logs/` of one run.

    And with `--trace` its `trace/`, with `--track tensorboard` its `tensorboard/`.

    Nothing is written, and nothing of an earlier run removed, before `begin`: a run that cannot
    start leaves what is there as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / _CHECKPOINTS

    @property
    def logs(self) -> Path:
        """Where each rank's log is."""
        return self.path / _LOGS

    @property
    def trace(self) -> Path:
        """Where what was traced of the run is."""
        return self.path / _TRACE

    @property
    def holds_a_run(self) -> bool:
        """Whether a run has begun here."""
        return all((self.path / name).is_file() for name in (_RECIPE, _METRICS))

    def require_usable(
        self, *, fresh: bool, resume: str = "none", start: Path | None = None
    ) -> None:
        """Raise RunFolderError if this run would write over another, or over what is not a run's.

        `resume` is none, auto or a path; `start` is the checkpoint that the run starts from.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is not a folder; choose another with --run-dir")
        if not self.holds_a_run:
            if self.path.exists() and any(self.path.iterdir()):
                raise RunFolderError(
                    f"{self.path} holds files that are not of a run; choose another with --run-dir"
                )
            return
        is_own = start is not None and start.resolve().is_relative_to(self.path.resolve())
        if fresh and (is_own or resume == "auto"):
            raise RunFolderError(
                f"--fresh removes the run in {self.path}, which this one is to start from: "
                "without --fresh, or with --run-dir for another folder"
            )
        if not fresh and resume != "auto" and not (is_own and resume != "none"):
            raise RunFolderError(
                f"there is a run in {self.path} already: --fresh to start it anew, "
                "--training.resume auto to go on with it, or --run-dir for another folder"
            )

    def was_begun_by(self, launch: str) -> bool:
        """Say whether it was in this launch that a run last began here."""
        with suppress(OSError):
            return (self.path / _LAUNCH).read_text(encoding="utf-8") == launch
        return False

    @property
    def has_saved(self) -> bool:
        """Whether a checkpoint was published since a run last began here."""
        with suppress(OSError):
            saved, begun = ((self.path / name).stat().st_mtime_ns for name in (_LATEST, _LAUNCH))
            return saved > begun
        return False

    def begin(
        self, recipe_toml: str, *, fresh: bool, first_step: int = 0, launch: str = ""
    ) -> None:
        """Make the folder and write down what runs; an earlier run keeps `first_step` steps.

        `launch` is what `was_begun_by` is asked for.
        """
        with self._writing():
            if fresh and self.holds_a_run:
                self._remove_run()
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.path / _RECIPE, recipe_toml)
            self._drop_after(first_step)
            # When it began is when its first leg did: `has_saved` is asked for all of them.
            if not self.was_begun_by(launch):
                _replace(self.path / _LAUNCH, launch)

    def record(self, metrics: StepMetrics) -> None:
        """Append a step's line to `metrics.jsonl`."""
        self._append(_METRICS, dataclasses.asdict(metrics))

    def record_validation(self, step: int, loss: float) -> None:
        """Append the validation loss after a step to `validation.jsonl`."""
        self._append(_VALIDATION, {"step": step, "valid_loss": loss})

    def metrics(self) -> list[dict[str, Any]]:
        """Return the steps that have been recorded."""
        return list(self._lines(_METRICS))

    def validations(self) -> list[dict[str, Any]]:
        """Return the validations that have been recorded."""
        return list(self._lines(_VALIDATION))

    def ranks_that_logged(self) -> int:
        """Return how many ranks have a log here: all, unless other machines write elsewhere."""
        return sum(1 for _ in self.logs.glob("rank-*.log"))

    def write_trace(self, name: str, text: str) -> None:
        """Write a file of the trace."""
        with self._writing():
            self.trace.mkdir(exist_ok=True)
            _replace(self.trace / name, text)

    def remove_trace(self) -> None:
        """Remove what was traced before."""
        with self._writing():
            self._remove(pattern for pattern in _WRITTEN if pattern.startswith(f"{_TRACE}/"))

    def traces(self) -> list[RankTrace]:
        """Return what each rank has traced, in order of rank; nothing if the run was not traced.

        Raises RunFolderError for a file that is not a trace, or cannot be read.
        """
        traces = []
        for file in self.trace.glob("rank-*.json"):
            try:
                traces.append(RankTrace.from_json(file.read_text(encoding="utf-8")))
            except (OSError, RunFolderError, UnicodeDecodeError) as error:
                raise RunFolderError(f"cannot read {file}: {error}") from None
        return sorted(traces, key=lambda trace: trace.rank)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        file = self.path / name
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            # A run that was killed may have left its last line unfinished.
            with suppress(json.JSONDecodeError):
                yield json.loads(line)

    def _drop_after(self, step: int) -> None:
        """Forget the steps after `step`: a run that goes on from there takes them again."""
        for name in (_METRICS, _VALIDATION):
            kept = [json.dumps(line) + "\n" for line in self._lines(name) if line["step"] <= step]
            if name == _METRICS or (self.path / name).exists():
                _replace(self.path / name, "".join(kept))

    def _remove_run(self) -> None:
        self._remove(_WRITTEN)

    def _remove(self, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            for found in self.path.glob(pattern):
                if found.is_dir():
                    shutil.rmtree(found)
                else:
                    found.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run folder {self.path}: {error.strerror or error}"
            ) from error


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = file.with_name(f".{file.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
