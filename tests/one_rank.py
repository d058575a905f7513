"""Layouts against one rank: losses and gradient norms, step by step, from one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import changed, grad_norms, losses, run

from mcore_lab.config import Recipe

LOSS, NORM = 1e-5, 1e-4
"""Relative; sums in fp32 come in another order on each layout."""

_SHORT = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def layout_of(words: str) -> tuple[int, dict[str, Any]]:
    """Return ranks and sizes: `4 ranks: tp2 sp ep2 etp1`; `zero` is the distributed optimizer."""
    ranks, _, rest = words.partition(" ranks:")
    sizes: dict[str, Any] = {}
    for word in rest.split():
        name = word.rstrip("0123456789")
        if name in _SHORT:
            sizes[_SHORT[name]] = int(word.removeprefix(name))
        else:
            sizes[{"sp": "sequence_parallel", "zero": "use_distributed_optimizer"}[word]] = True
    return int(ranks), sizes


class OneRank:
    """A model's initial weights, and one rank's training from them."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        run(changed(recipe, training={"steps": 0}), 1, folder / "initial")
        self.recipe = changed(recipe, checkpoint={"load": str(folder / "initial"), "save": False})
        self.metrics = run(self.recipe, 1, folder / "one_rank")

    def on(
        self,
        layout: str,
        folder: Path,
        *,
        timeout: float = 120,
        data: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        **transformer: Any,
    ) -> list[dict[str, Any]]:
        """Train from the same weights on a layout, with other fields of the transformer."""
        ranks, sizes = layout_of(layout)
        fields = {"transformer": self.recipe.model.transformer | transformer}
        recipe = changed(
            self.recipe, layout=sizes, model=fields, data=data or {}, training=training or {}
        )
        return run(recipe, ranks, folder / "run", timeout=timeout)

    def agrees_with(
        self, metrics: list[dict[str, Any]], loss: float = LOSS, norm: float = NORM
    ) -> bool:
        """Say whether every step's loss and gradient norm is that of one rank."""
        return len(metrics) == self.recipe.training.steps and (
            losses(metrics) == pytest.approx(losses(self.metrics), rel=loss)
            and grad_norms(metrics) == pytest.approx(grad_norms(self.metrics), rel=norm)
        )
