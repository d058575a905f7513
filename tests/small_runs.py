"""Runs of a small model on forked ranks, through the same door as the command line's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_lab.config import Data, Model, Recipe, RunArguments, Training
from mcore_lab.recipes.start import require_startable, run_rank
from mcore_lab.runtime import choose_device, launch
from mcore_lab.training import RunFolder

SMALL = Recipe(
    name="tp2_gpt",
    model=Model(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=128,
        transformer={"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    # Long mock documents cost every rank a second: it shuffles all samples that they hold.
    data=Data(sequence_length=16, micro_batch_size=2, global_batch_size=8, mock_document_length=64),
    # Adam divides by the root of a gradient's square: at 1e-2 what rounding leaves of a gradient
    # that ought to be zero moves weights so far that losses differ by 1e-4 four steps later.
    training=Training(steps=4, lr=2e-3),
)


def changed(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    """Return the recipe with other values: `changed(SMALL, training={"steps": 2})`."""
    changes = {name: replace(getattr(recipe, name), **values) for name, values in parts.items()}
    return replace(recipe, **changes)


def run(
    recipe: Recipe, nproc: int, folder: Path, *, fresh: bool = False, timeout: float = 120
) -> list[dict[str, Any]]:
    """Run the recipe and return the lines of its `metrics.jsonl`."""
    return launched_run(run_rank, recipe, nproc, folder, fresh=fresh, timeout=timeout)


def launched_run(
    rank: Callable[[RunArguments], Any],
    recipe: Recipe,
    nproc: int,
    folder: Path,
    *,
    fresh: bool = False,
    timeout: float = 120,
) -> list[dict[str, Any]]:
    """Run the recipe by what each rank does with its arguments; return what `run` does."""
    arguments = RunArguments(recipe=recipe, run_dir=folder, fresh=fresh, json=True)
    require_startable(arguments, nproc)
    launch(rank, nproc, arguments, timeout=timeout, device=choose_device(nproc).type)
    return RunFolder(folder).metrics()


def loads(metrics: list[dict[str, Any]]) -> list[dict[str, list[int]] | None]:
    """Return the tokens of each expert, by layer, of each step."""
    return [line["tokens_per_expert"] for line in metrics]


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in metrics]


def grad_norms(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["grad_norm"] for line in metrics]
