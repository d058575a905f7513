"""A checkpoint made of weights in safetensors files, for a run to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_lab import cpu
from mcore_lab.checkpoint import step_folder
from mcore_lab.config import Data, Model, Recipe, recipe_from_toml, recipe_to_toml
from mcore_lab.errors import CheckpointError
from mcore_lab.exchange import RECIPE_FILE
from mcore_lab.exchange.huggingface_config import CONFIG, dtype_of, heads_of, model_of
from mcore_lab.exchange.huggingface_names import huggingface_names
from mcore_lab.exchange.naming import Shape, megatron_names
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import load_recipe, recipe_names
from mcore_lab.recipes.standing import stand, standing_still
from mcore_lab.runtime import launch

if TYPE_CHECKING:
    from mcore_lab.exchange.fill import Naming

BASE = "tp2_gpt"
"""The recipe whose data and training an imported model gets where it comes with none."""

_EMBEDDINGS = ("model.embed_tokens.weight", "embedding.word_embeddings.weight")


@dataclass(frozen=True)
class Imported:
    """What has been written."""

    checkpoint: Path
    recipe: Path
    """A file to run, of the model and what it came with."""
    rounded: tuple[str, ...]
    """Tensors that the model's precision could not hold as they were."""


def recipe_of(source: Path) -> Recipe:
    """Return the recipe of the model in `source`, a safetensors file or a folder of them.

    Of what lies beside it: Hugging Face's `config.json`, with the data and the training of the
    recipe `tp2_gpt` on one rank, or the `recipe.toml` of an export. Raises CheckpointError if there
    is neither, or if it is of a model that cannot be imported.
    """
    from mcore_lab.exchange.safetensors_read import folder_of, read_json

    folder = folder_of(source)
    if not source.exists():
        raise CheckpointError(f"there is nothing to import at {source}: no such file or folder")
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        try:
            model = model_of(config)
        except CheckpointError as error:
            raise CheckpointError(f"cannot import {folder / CONFIG}: {error}") from None
        base = load_recipe(BASE)
        is_bf16 = dtype_of(config) == "bfloat16"
        return replace(
            base,
            model=model,
            data=_small_enough(base.data, model),
            training=replace(base.training, precision="bf16" if is_bf16 else "fp32"),
            layout=ParallelLayout(),
        )
    if (folder / RECIPE_FILE).is_file():
        return _anew(recipe_from_toml(folder / RECIPE_FILE))
    raise CheckpointError(
        f"cannot tell what model {source} is of: neither {CONFIG} nor {RECIPE_FILE} is beside it"
    )


def import_weights(source: Path, target: Path, recipe: Recipe, nproc: int) -> Imported:
    """Write the weights in `source` as the checkpoint `target/step-00000000` of `recipe`'s model.

    The ranks are `nproc` processes of this machine, on CPU. Raises LayoutError if the layout breaks
    a rule, and CheckpointError if the tensors are not of this model or cannot be read, or if there
    is a checkpoint already, or it cannot be written.
    """
    recipe.layout.require(recipe.model, recipe.data, nproc)
    written, file = step_folder(target, 0), target / RECIPE_FILE
    for path in (written, file):
        if path.exists():
            raise CheckpointError(f"there is {path} already; name another folder")
    cpu.preload()
    from mcore_lab.exchange.safetensors_read import SafetensorsFiles, folder_of
    from mcore_lab.exchange.safetensors_write import write_text

    files = SafetensorsFiles(source)
    naming: Naming = megatron_names
    if (folder_of(source) / CONFIG).is_file():
        naming = partial(huggingface_names, heads=heads_of(recipe.model))
    standing = standing_still(recipe, _rows(source, files.shapes))
    toml = recipe_to_toml(recipe)
    rounded = launch(_rank, nproc, standing, written, files, naming, toml, device="cpu")
    base = load_recipe(recipe.name) if recipe.name in recipe_names() else None
    try:
        write_text(file, recipe_to_toml(recipe, base=base))
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from None
    return Imported(written, file, tuple(sorted(set().union(*rounded))))


def _small_enough(data: Data, model: Model) -> Data:
    """Return data with no more tokens, and no longer samples, than the model takes."""
    assert model.max_sequence_length and model.vocab_size
    return replace(
        data,
        sequence_length=min(data.sequence_length, model.max_sequence_length),
        mock_vocab_size=min(data.mock_vocab_size, model.vocab_size - 1),
    )


def _anew(recipe: Recipe) -> Recipe:
    """Return the recipe without where its own run began."""
    return replace(
        recipe,
        training=replace(recipe.training, resume="none"),
        checkpoint=replace(recipe.checkpoint, load=None),
    )


def _rows(source: Path, shapes: Mapping[str, Shape]) -> int:
    for name in _EMBEDDINGS:
        if shapes.get(name):
            return shapes[name][0]
    raise CheckpointError(f"{source} is not of a language model: it has no {_EMBEDDINGS[0]}")


def _rank(recipe: Recipe, written: Path, files: Any, naming: Naming, toml: str) -> set[str]:
    from mcore_lab.checkpoint.save import save_checkpoint
    from mcore_lab.checkpoint.state import Progress
    from mcore_lab.exchange.fill import fill

    rounded: set[str] = set()

    def fill_and_save(model: list[Any], optimizer: Any, scheduler: Any) -> None:
        rounded.update(fill(model, files, naming))
        optimizer.reload_model_params()
        save_checkpoint(written, model, optimizer, scheduler, Progress(), toml)

    stand(recipe, fill_and_save)
    return rounded
