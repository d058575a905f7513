"""Training is the same on every layout: losses and gradient norms, step by step.

Layouts are compared from one checkpoint, since initial weights depend on the layout: pipeline
ranks draw theirs apart. Sums in fp32 come in another order on each; that is all that may differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, grad_norms, losses, run

from mcore_lab.config import Recipe
from mcore_lab.recipes import load_recipe

LOSS, NORM = 1e-5, 1e-4
BF16_LOSS, BF16_NORM = 2e-3, 3e-2

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2 sp": (2, TP2 | {"sequence_parallel": True}),
    "dp2": (2, {}),
    "dp2 distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "pp2": (2, PP2),
    "pp2 interleaved": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "tp2 sp dp2 distributed optimizer": (
        4,
        TP2 | {"sequence_parallel": True, "use_distributed_optimizer": True},
    ),
    "tp2 pp2": (4, TP2 | PP2),
}


class Start:
    """A model's initial weights, written by two tensor-parallel ranks, and one rank's run."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        run(changed(recipe, training={"steps": 0}, layout=TP2), 2, folder / "initial")
        self.recipe = changed(recipe, checkpoint={"load": str(folder / "initial"), "save": False})
        self.folder = folder
        self.metrics = self.run(1, "one_rank")

    def run(self, nproc: int, name: str, **parts: dict[str, Any]) -> list[dict[str, Any]]:
        return run(changed(self.recipe, **parts), nproc, self.folder / name, timeout=300)

    def require_same(
        self, metrics: list[dict[str, Any]], loss: float = LOSS, norm: float = NORM
    ) -> None:
        assert len(metrics) == self.recipe.training.steps
        assert losses(metrics) == pytest.approx(losses(self.metrics), rel=loss, abs=1e-6)
        assert grad_norms(metrics) == pytest.approx(grad_norms(self.metrics), rel=norm)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(SMALL, tmp_path_factory.mktemp("small"))


def test_the_run_that_all_are_held_against_learns(small: Start) -> None:
    first, *_, last = losses(small.metrics)
    assert last < first - 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_trains_as_one_rank_does(small: Start, name: str) -> None:
    nproc, layout = LAYOUTS[name]
    small.require_same(small.run(nproc, name, layout=layout))


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_split_into_micro_batches_changes_nothing(small: Start, micro_batch_size: int) -> None:
    data = {"micro_batch_size": micro_batch_size}
    small.require_same(small.run(1, f"micro_{micro_batch_size}", data=data))


def test_embeddings_tied_across_pipeline_stages_train_as_on_one_rank(tmp_path: Path) -> None:
    tied = changed(SMALL, model={"share_embeddings_and_output_weights": True})
    start = Start(tied, tmp_path)
    start.require_same(start.run(2, "pp2", layout=PP2))


def test_a_llama_shaped_model_trains_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    llama = SMALL.model.transformer | {
        "activation_func": "silu",
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
    }
    model = {"position_embedding_type": "rope", "num_query_groups": 2, "transformer": llama}
    start = Start(changed(SMALL, model=model), tmp_path)
    start.require_same(start.run(2, "tp2_sp", layout=TP2 | {"sequence_parallel": True}))


def test_bf16_trains_on_two_ranks_as_on_one_and_as_fp32_within_its_precision(
    small: Start, tmp_path: Path
) -> None:
    start = Start(changed(SMALL, training={"precision": "bf16"}), tmp_path)
    for name in ("tp2", "dp2 distributed optimizer"):
        nproc, layout = LAYOUTS[name]
        start.require_same(start.run(nproc, name, layout=layout), BF16_LOSS, BF16_NORM)
    assert losses(start.metrics) == pytest.approx(losses(small.metrics), rel=10 * BF16_LOSS)
    assert losses(start.metrics) != pytest.approx(losses(small.metrics), rel=LOSS)


def test_tp2_gpt_has_the_same_loss_at_every_step_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    one = changed(
        load_recipe("tp2_gpt"), layout={"tensor_model_parallel_size": 1}, training={"steps": 4}
    )
    start = Start(one, tmp_path)
    start.require_same(start.run(2, "tp2", layout=TP2))
