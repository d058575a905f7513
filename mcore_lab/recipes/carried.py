"""The recipe that a checkpoint carries: that of the run which wrote it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from mcore_lab import cpu
from mcore_lab.checkpoint.contents import contents_of, tensors_of
from mcore_lab.config import Recipe, recipe_from_toml
from mcore_lab.errors import CheckpointError, ConfigError
from mcore_lab.recipes.files import is_file, recipe_at

_WORD_EMBEDDING = "embedding.word_embeddings.weight"


def recipe_in(source: Path) -> Recipe:
    """Return the recipe of the run that wrote the checkpoint. Raises CheckpointError."""
    recipe = recipe_if_in(source)
    if recipe is None:
        raise CheckpointError(f"the checkpoint {source} does not hold the recipe of its run")
    return recipe


def recipe_if_in(source: Path) -> Recipe | None:
    """Return the recipe of the run that wrote the checkpoint, or None where it holds none.

    Raises CheckpointError if it cannot be read.
    """
    contents = contents_of(source)
    cpu.preload()
    from mcore_lab.checkpoint.load import common_state

    toml = common_state(source, contents).get("recipe")
    if toml is None:
        return None
    with tempfile.TemporaryDirectory(prefix="mcore_lab-") as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(toml, encoding="utf-8")
        return recipe_from_toml(file)


def with_named_module(recipe: Recipe, source: Path, module: str | None) -> Recipe:
    """Return the recipe of a checkpoint, of a model of one's own with the file that builds it.

    That file is code, and a checkpoint runs none: a person has to name it (`--module`), and not the
    checkpoint, which may come from elsewhere, as may what lies beside it. Raises ConfigError.
    """
    if not is_file(recipe.name):
        if module is not None:
            raise ConfigError(
                f"--module is for a model of your own: {source} is of the recipe {recipe.name}"
            )
        return recipe
    if module is None:
        raise ConfigError(
            f"the model of {source} is built by code, which the checkpoint says is in "
            f"{recipe.name}: if you trust that file, --module {recipe.name}"
        )
    recipe_at(module)
    return replace(recipe, name=module)


def embedding_rows(source: Path) -> int:
    """Return how many rows the word embedding of the checkpoint has. Raises CheckpointError."""
    embedding = tensors_of(source).get(_WORD_EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"the checkpoint {source} is of no GPT: it has no {_WORD_EMBEDDING}")
    return embedding.shape[0]
