"""`--track tensorboard`: a run's curves, to be watched with `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.training.run_folder import TENSORBOARD_FOLDER

_SECONDS_BETWEEN_WRITES = 5


class TensorBoard:
    """Writes event files into the folder `tensorboard/` of the run."""

    def start(self, recipe: Recipe, folder: Path, first_step: int) -> None:
        """Open an event file; a run that goes on does so in the curves that it has.

        TensorBoard then leaves out (`purge_step`) what earlier files say of later steps.
        """
        self._writer = SummaryWriter(
            str(folder / TENSORBOARD_FOLDER),
            purge_step=first_step + 1 if first_step else None,
            flush_secs=_SECONDS_BETWEEN_WRITES,
        )
        as_code = recipe_to_toml(recipe).replace("\n", "\n    ")
        self._writer.add_text("recipe", f"    {as_code}", first_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        """Write what is left."""
        self._writer.close()
