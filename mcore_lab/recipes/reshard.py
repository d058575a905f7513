"""A checkpoint written anew, as the ranks of another layout would have written it.

Any layout reads any checkpoint, so a run that goes on needs none of this. It is for ranks that are
to find what is theirs in files of their own, and to see, before a job is queued, that a layout can
take the checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_lab import cpu
from mcore_lab.checkpoint import step_folder
from mcore_lab.checkpoint.trust import read_metadata
from mcore_lab.config import Recipe, recipe_from_toml, recipe_to_toml
from mcore_lab.errors import CheckpointError
from mcore_lab.runtime import RankLog, launch, process_group

_WORD_EMBEDDING = "embedding.word_embeddings.weight"


def recipe_in(source: Path) -> Recipe:
    """Return the recipe of the run that wrote the checkpoint. Raises CheckpointError."""
    read_metadata(source)
    cpu.preload()
    from mcore_lab.checkpoint.load import common_state

    toml = common_state(source).get("recipe")
    if toml is None:
        raise CheckpointError(f"the checkpoint {source} does not hold the recipe of its run")
    with tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(toml, encoding="utf-8")
        return recipe_from_toml(file)


def reshard(source: Path, target: Path, recipe: Recipe, nproc: int) -> Path:
    """Write the checkpoint `source` as `recipe`'s layout on `nproc` ranks does, into `target`.

    The ranks are processes of this machine, on CPU; they take no step and read no data. Returns the
    new checkpoint, `target/step-N`. Raises LayoutError if the layout breaks a rule, and
    CheckpointError if the checkpoint cannot be read, is of another model, or cannot be written.
    """
    recipe.layout.require(recipe.model, recipe.data, nproc)
    read_metadata(source)
    cpu.preload()
    from mcore_lab.checkpoint.load import common_state, progress_in, tensors_in

    progress = progress_in(source, common_state(source))
    written = step_folder(target, progress.step)
    if written.exists():
        raise CheckpointError(f"there is a checkpoint at {written} already")
    # The embedding has the rows that the data's tokenizer needed; mock data needs fewer.
    rows = tensors_in(source)[_WORD_EMBEDDING].global_shape[0]
    standing = replace(
        recipe,
        model=replace(recipe.model, vocab_size=rows),
        data=replace(recipe.data, path=None, num_samples=1, mock_vocab_size=1),
        training=replace(recipe.training, steps=progress.step, resume=str(source)),
        checkpoint=replace(recipe.checkpoint, load=None, save=False),
    )
    launch(_rank, nproc, standing, written, progress, recipe_to_toml(recipe), device="cpu")
    return written


def _rank(recipe: Recipe, written: Path, progress: Any, toml: str) -> None:
    from mcore_lab.checkpoint.save import save_checkpoint
    from mcore_lab.recipes.story import train
    from mcore_lab.training import RunFolder
    from mcore_lab.training.console import Console
    from mcore_lab.training.recorder import Recorder

    class Resaver(Recorder):
        """Records nothing of a run that takes no step, and saves what it has read."""

        def begin(self, *what_runs: object) -> None:
            """Make no run folder."""

        def look_at_end(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
            """Save."""
            save_checkpoint(written, model, optimizer, scheduler, progress, toml)

    with RankLog(int(os.environ["RANK"])) as log, process_group(device="cpu") as world:
        nowhere, console = RunFolder(Path("nowhere")), Console(speaks=False)
        train(recipe, world, Resaver(nowhere, log, console, recipe_toml="", fresh=False))
