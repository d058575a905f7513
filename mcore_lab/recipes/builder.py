"""Which model a recipe trains: the GPT that its values describe, or what its own module builds."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.backends import Backend
from mcore_lab.config import Recipe
from mcore_lab.model import BuildChunk, Stage, gpt_chunk
from mcore_lab.recipes.files import is_file, module_at


def recipe_chunk(
    recipe: Recipe, config: TransformerConfig, stage: Stage, backend: Backend, vocab_size: int
) -> torch.nn.Module:
    """Return the part of the recipe's model that belongs to a stage of the pipeline.

    By the `build` of the recipe's module, if it is a file that defines one; else `gpt_chunk`.
    """
    build = own_build(recipe) or gpt_chunk
    chunk: torch.nn.Module = build(recipe, config, stage, backend, vocab_size)
    return chunk


def own_build(recipe: Recipe) -> BuildChunk | None:
    """Return the `build` of the recipe's module, if it is a file that defines one."""
    return getattr(module_at(recipe.name), "build", None) if is_file(recipe.name) else None
