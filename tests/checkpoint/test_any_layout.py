"""A run goes on on any layout, from a checkpoint of any other, with its optimizer.

Each hop takes a step on another layout and leaves a checkpoint to the next one. Every loss must be
that of one rank that takes all the steps: to 1e-5, as sums in fp32 come in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_rank import LOSS, layout_of
from small_runs import SMALL, changed, losses, run

from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError

RECIPE = changed(
    SMALL,
    data={"micro_batch_size": 1},
    training={"weight_decay": 1.0, "lr_decay_style": "cosine", "lr_decay_steps": 12},
)
EXPERTS = {
    "add_bias_linear": False,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
MIXTURE = changed(
    RECIPE,
    model={
        "num_layers": 2,
        "num_moe_experts": 4,
        "transformer": RECIPE.model.transformer | EXPERTS,
    },
)
GATED = {"gated_linear_unit": True, "activation_func": "silu"}


def hops(recipe: Recipe, layouts: list[str], folder: Path) -> list[float]:
    """Take a step on each layout, each from the last one's checkpoint; return the losses.

    A layout may end in `grouped`: its experts are one product, and else one after the other.
    """
    found = []
    for step, words in enumerate(layouts, start=1):
        nproc, sizes = layout_of(words.removesuffix(" grouped"))
        grouped = {"moe_grouped_gemm": True} if words.endswith(" grouped") else {}
        fields = {"transformer": recipe.model.transformer | grouped}
        start: dict[str, Any] = {"training": {"steps": step}}
        if step > 1:
            start["training"]["resume"] = str(folder / f"step {step - 1}")
        hop = changed(recipe, layout=sizes, model=fields, **start)
        found += losses(run(hop, nproc, folder / f"step {step}"))[-1:]
    return found


def on_one_rank(recipe: Recipe, steps: int, folder: Path) -> tuple[Recipe, list[float]]:
    """Return the recipe with initial weights to load, and one rank's losses from there."""
    run(changed(recipe, training={"steps": 0}), 1, folder / "initial")
    loaded = changed(recipe, checkpoint={"load": str(folder / "initial")})
    alone = changed(loaded, training={"steps": steps}, checkpoint={"save": False})
    return loaded, losses(run(alone, 1, folder / "alone"))


CHAINS: dict[str, tuple[Recipe, list[str]]] = {
    "dense": (
        RECIPE,
        [
            "2 ranks: tp2 sp",
            "2 ranks: zero",
            "2 ranks: pp2 vpp2",
            "2 ranks: cp2 zero",
            "1 ranks:",
            "2 ranks: tp2 zero",
            "4 ranks: tp2 pp2",
            "1 ranks: zero",
            "2 ranks:",
        ],
    ),
    "tied embeddings, gated": (
        changed(
            RECIPE,
            model={
                "share_embeddings_and_output_weights": True,
                "transformer": RECIPE.model.transformer | GATED,
            },
        ),
        ["2 ranks: pp2 zero", "2 ranks: tp2", "1 ranks: zero", "4 ranks: tp2 pp2 zero", "1 ranks:"],
    ),
    "experts": (
        MIXTURE,
        [
            "1 ranks:",
            "2 ranks: ep2 grouped",
            "2 ranks: ep2 zero",
            "2 ranks: tp2 sp etp1 grouped",
            "4 ranks: tp2 sp ep2 etp2 zero grouped",
            "2 ranks: pp2",
            "2 ranks: zero grouped",
            "1 ranks: zero",
        ],
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_every_layout_goes_on_where_another_left_off(kind: str, tmp_path: Path) -> None:
    recipe, layouts = CHAINS[kind]
    recipe, alone = on_one_rank(recipe, len(layouts), tmp_path)
    assert hops(recipe, layouts, tmp_path) == pytest.approx(alone, rel=LOSS)


@pytest.mark.parametrize("saved", [True, False], ids=["from it", "to it"])
def test_bf16_has_the_same_main_weights_with_the_distributed_optimizer(
    saved: bool, tmp_path: Path
) -> None:
    """On one rank it computes what the other does: a main weight that was lost would show."""
    recipe = changed(RECIPE, training={"precision": "bf16", "steps": 4})
    layouts = ["1 ranks: zero", "1 ranks:"] if saved else ["1 ranks:", "1 ranks: zero"]
    alone = losses(run(recipe, 1, tmp_path / "alone"))
    found = hops(recipe, [layouts[0]] * 2 + [layouts[1]] * 2, tmp_path)
    assert found == pytest.approx(alone, rel=1e-6)


def test_a_vocabulary_that_another_layout_rounds_up_is_told_in_numbers(tmp_path: Path) -> None:
    """Rows that are there to be divisible by the tensor-parallel size are part of the model."""
    recipe = changed(
        RECIPE, model={"vocab_size": None, "num_attention_heads": 3, "hidden_size": 48}
    )
    run(changed(recipe, training={"steps": 1}), 1, tmp_path / "one")
    resume = {"steps": 2, "resume": str(tmp_path / "one")}
    recipe = changed(recipe, training=resume, layout={"tensor_model_parallel_size": 3})
    with pytest.raises(CheckpointError) as raised:
        run(recipe, 3, tmp_path / "three")
    rows = "embedding.word_embeddings.weight is (128, 48) in it and (384, 48) in this model"
    assert rows in str(raised.value)
