"""The folder of a run: what ran, what was measured, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_lab.errors import RunFolderError

if TYPE_CHECKING:
    from mcore_lab.training.metrics import StepMetrics

_RECIPE, _METRICS, _VALIDATION = "recipe.toml", "metrics.jsonl", "validation.jsonl"
_CHECKPOINTS, _LOGS = "checkpoints", "logs"


class RunFolder:
    """`recipe.toml`, `metrics.jsonl`, `checkpoints/` and `logs/` of one run.

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

    def require_usable(self, *, fresh: bool, resume: bool) -> None:
        """Raise RunFolderError if a run is there that this one would write over."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is not a folder; choose another with --run-dir")
        if (self.path / _RECIPE).exists() and not (fresh or resume):
            raise RunFolderError(
                f"there is a run in {self.path} already: --fresh to start it anew, "
                "--training.resume auto to go on with it, or --run-dir for another folder"
            )
        if self.path.exists() and not (self.path / _RECIPE).exists() and any(self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} holds files that are not of a run; choose another with --run-dir"
            )

    def begin(self, recipe_toml: str, *, fresh: bool) -> None:
        """Make the folder, empty if the run is fresh, and write down what runs."""
        try:
            if fresh:
                for name in (_RECIPE, _METRICS, _VALIDATION):
                    (self.path / name).unlink(missing_ok=True)
                for folder in (self.checkpoints, self.logs):
                    shutil.rmtree(folder, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / _RECIPE).write_text(recipe_toml, encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"cannot write the run folder {self.path}: {error}") from error

    def drop_metrics_after(self, step: int) -> None:
        """Forget the steps after `step`: a run that goes on from there takes them again."""
        for name in (_METRICS, _VALIDATION):
            kept = [line for line in self._lines(name) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text or name == _METRICS:
                (self.path / name).write_text(text, encoding="utf-8")

    def record(self, metrics: StepMetrics) -> None:
        """Append a step's line to `metrics.jsonl`."""
        with (self.path / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")

    def record_validation(self, step: int, loss: float) -> None:
        """Append the validation loss after a step to `validation.jsonl`."""
        with (self.path / _VALIDATION).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "valid_loss": loss}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Return the steps that have been recorded."""
        return self._lines(_METRICS)

    def _lines(self, name: str) -> list[dict[str, float]]:
        file = self.path / name
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
