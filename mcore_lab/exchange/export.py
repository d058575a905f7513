"""A checkpoint of any layout as safetensors, in one process: one tensor at a time is in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mcore_lab.checkpoint.contents import Tensor, tensors_of
from mcore_lab.checkpoint.folders import hidden
from mcore_lab.checkpoint.integrity import differences, require_same_files
from mcore_lab.checkpoint.publication import sync
from mcore_lab.checkpoint.read import read
from mcore_lab.config import Model, Recipe, recipe_to_toml
from mcore_lab.errors import CheckpointError
from mcore_lab.exchange import RECIPE_FILE
from mcore_lab.exchange.huggingface_config import CONFIG, config_of, heads_of, misfits
from mcore_lab.exchange.huggingface_names import huggingface_names
from mcore_lab.exchange.naming import Named, Shape, in_a_line, megatron_names
from mcore_lab.exchange.safetensors_write import Declared, write_files, write_text

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Exported:
    """What has been written."""

    naming: str
    """`megatron` or `huggingface`."""
    note: str
    """Why it is not Hugging Face's naming, if that was not asked for."""
    files: tuple[str, ...]
    """In the order in which they were written."""
    tensors: int
    size: int
    """Of the tensors, in bytes."""


def export(
    source: Path,
    out: Path,
    recipe: Recipe | None,
    *,
    naming: str = "auto",
    shard_size: int = 5 * 10**9,
    verify: bool = True,
) -> Exported:
    """Write the weights of the checkpoint `source` as whole tensors to the new folder `out`.

    Under Hugging Face's names it comes with a `config.json`, under Megatron-Core's with the recipe,
    where the checkpoint holds one. `naming` is `huggingface`, `megatron` or `auto`: the first where
    the model is a Llama or a Mixtral. `out` appears when all of it is on disk. Raises
    CheckpointError if the checkpoint cannot be read or named so, and if `out` is there already or
    cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} is there already; name a folder that is not")
    if verify:
        require_same_files(source, differences(source))
    tensors = {key: one for key, one in tensors_of(source).items() if not one.is_state}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    reasons = [] if naming == "megatron" else _reasons(shapes, recipe)
    if reasons and naming == "huggingface":
        raise CheckpointError(
            f"the checkpoint {source} cannot have Hugging Face's names: {in_a_line(reasons)}; "
            "--naming megatron writes any model"
        )
    if naming == "megatron" or reasons or recipe is None:
        naming, named = "megatron", megatron_names(shapes)
        beside = {RECIPE_FILE: recipe_to_toml(recipe)} if recipe else {}
    else:
        naming, named = "huggingface", huggingface_names(shapes, heads_of(recipe.model))
        beside = {CONFIG: _config(recipe, tensors[_EMBEDDING])}
    declared = [Declared(one.name, tensors[one.key].dtype, one.shape) for one in named]
    size = sum(one.size for one in declared)
    with _published(out, size) as unfinished:
        files = write_files(unfinished, declared, _contents(source, tensors, named), shard_size)
        for name, text in beside.items():
            write_text(unfinished / name, text)
    names = (*(file.name for file in files), *beside)
    return Exported(naming, in_a_line(reasons), names, len(named), size)


def _reasons(shapes: Mapping[str, Shape], recipe: Recipe | None) -> list[str]:
    """Return why the tensors cannot have Hugging Face's names, if they cannot."""
    if recipe is None:
        return ["it does not hold the recipe of its run, which says what model it is of"]
    return misfits(recipe.model) or _without_place(shapes, recipe.model)


def _without_place(shapes: Mapping[str, Shape], model: Model) -> list[str]:
    found = []
    for key, shape in shapes.items():
        try:
            huggingface_names({key: shape}, heads_of(model))
        except CheckpointError as error:
            found.append(str(error))
    return found


def _config(recipe: Recipe, embedding: Tensor) -> str:
    return config_of(
        recipe.model,
        vocab_size=embedding.shape[0],
        max_sequence_length=recipe.model.max_sequence_length or recipe.data.sequence_length,
        dtype=embedding.dtype,
    )


def _contents(
    source: Path, tensors: Mapping[str, Tensor], named: Sequence[Named]
) -> Iterator[torch.Tensor]:
    """Return each tensor. Those that are parts of one follow each other, and it is read once."""
    at, whole = None, torch.empty(0)
    for one in named:
        if at != (one.key, one.index):
            # Nothing of the last one is kept while the next is read.
            whole = torch.empty(0)
            at, whole = (one.key, one.index), read(source, tensors[one.key], one.index)
        yield _part(whole, one.rows)


def _part(whole: torch.Tensor, rows: Sequence[range]) -> torch.Tensor:
    parts = [whole[part.start : part.stop] for part in rows] or [whole]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@contextmanager
def _published(out: Path, size: int) -> Iterator[Path]:
    """Give a folder to write to, which becomes `out` if the body succeeds; else nothing is left."""
    unfinished = hidden(out, "unfinished")
    try:
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _require_room(unfinished, size)
            yield unfinished
            sync(unfinished)
            unfinished.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"cannot write to {folder.parent}: it takes {size / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free"
        )
