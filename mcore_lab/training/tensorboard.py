"""`--track tensorboard`: a run's curves, to be watched with `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.training.run_folder import TENSORBOARD_FOLDER

_SECONDS_BETWEEN_WRITES = 5

_TAGS = {
    "loss": "loss/training",
    "valid_loss": "loss/validation",
    "mtp_loss": "loss/multi_token_prediction",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens_per_second": "resources/tokens_per_second",
    "tflops_per_rank": "resources/tflops_per_rank",
    "mfu": "resources/mfu",
    "peak_memory_bytes": "resources/peak_memory_bytes",
    "expert_imbalance": "mixture_of_experts/imbalance",
    "step_seconds": "seconds/step",
    "seconds_by_phase": "seconds/of_step",
    "validation_seconds": "seconds/validation",
    "checkpoint_seconds": "seconds/checkpoint",
}
"""What begins with one word is shown together, and such groups by the alphabet."""


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
            self._writer.add_scalar(tag(name), value, step)

    def end(self) -> None:
        """Write what is left."""
        self._writer.close()


def tag(name: str) -> str:
    """Return what a curve is called here; a part of something (`whole/part`) keeps its own name."""
    whole, slash, part = name.partition("/")
    return _TAGS.get(whole, whole) + slash + part
