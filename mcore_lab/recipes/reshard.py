"""A checkpoint written anew, as the ranks of another layout would have written it.

Any layout reads any checkpoint, so a run that goes on needs none of this. It is for ranks that are
to find what is theirs in files of their own, and to see, before a job is queued, that a layout can
take the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcore_lab import cpu
from mcore_lab.checkpoint import step_folder
from mcore_lab.checkpoint.contents import contents_of
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.errors import CheckpointError
from mcore_lab.recipes.carried import embedding_rows
from mcore_lab.recipes.standing import stand, standing_still
from mcore_lab.runtime import launch


def reshard(source: Path, target: Path, recipe: Recipe, nproc: int) -> Path:
    """Write the checkpoint `source` as `recipe`'s layout on `nproc` ranks does, into `target`.

    The ranks are processes of this machine, on CPU; they take no step and read no data. Returns the
    new checkpoint, `target/step-N`. Raises LayoutError if the layout breaks a rule, and
    CheckpointError if the checkpoint cannot be read, is of another model, or cannot be written.
    """
    recipe.layout.require(recipe.model, recipe.data, nproc)
    contents = contents_of(source)
    cpu.preload()
    from mcore_lab.checkpoint.load import common_state, progress_in

    progress = progress_in(source, common_state(source, contents))
    written = step_folder(target, progress.step)
    if written.exists():
        raise CheckpointError(f"there is a checkpoint at {written} already")
    standing = standing_still(
        recipe, embedding_rows(source), step=progress.step, resume=str(source)
    )
    launch(_rank, nproc, standing, written, progress, recipe_to_toml(recipe), device="cpu")
    return written


def _rank(recipe: Recipe, written: Path, progress: Any, toml: str) -> None:
    from mcore_lab.checkpoint.save import save_checkpoint

    def save(model: list[Any], optimizer: Any, scheduler: Any) -> None:
        save_checkpoint(written, model, optimizer, scheduler, progress, toml)

    stand(recipe, save)
