"""A run that takes no step and reads no data, for what is done with a model as it stands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_lab.config import Recipe
from mcore_lab.runtime import RankLog, process_group

Act = Callable[[list[Any], Any, Any], None]
"""What is done with a rank's model, optimizer and schedule."""


def standing_still(recipe: Recipe, rows: int, *, step: int = 0, resume: str = "none") -> Recipe:
    """Return the recipe of a run that stays at `step`, of a model with `rows` embeddings.

    A model's embedding has the rows that the data's tokenizer needed; mock data needs fewer.
    """
    return replace(
        recipe,
        model=replace(recipe.model, vocab_size=rows),
        data=replace(recipe.data, path=None, num_samples=1, mock_vocab_size=1),
        training=replace(recipe.training, steps=step, resume=resume),
        checkpoint=replace(recipe.checkpoint, load=None, save=False),
    )


def stand(recipe: Recipe, act: Act) -> None:
    """Be a rank of a run that stands still, on CPU, and act on what it has built and read."""
    from mcore_lab.recipes.story import train
    from mcore_lab.training import RunFolder
    from mcore_lab.training.console import Console
    from mcore_lab.training.recorder import Recorder

    class Bystander(Recorder):
        """Records nothing of the run."""

        def begin(self, *what_runs: object) -> None:
            """Make no run folder."""

        def look_at_start(self, *what_runs: object) -> None:
            """Count and time nothing."""

        def look_at_end(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
            """Act."""
            act(model, optimizer, scheduler)

    with RankLog(int(os.environ["RANK"])) as log, process_group(device="cpu") as world:
        nowhere, console = RunFolder(Path("nowhere")), Console(speaks=False)
        train(recipe, world, Bystander(nowhere, log, console, recipe_toml="", fresh=False))
