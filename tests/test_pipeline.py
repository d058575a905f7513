"""Pipelines of any shape and any number of micro-batches train as one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_runs
from one_rank import OneRank
from small_runs import SMALL, changed, grad_norms

from mcore_lab.errors import LayoutError

RECIPE = changed(SMALL, model={"position_embedding_type": "rope"}, training={"steps": 3})
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "a layout of stages": ("2 ranks: pp2", {"pipeline_model_parallel_layout": "Et|tttL"}),
    "one that has the loss on a stage of its own": (
        "3 ranks: pp3",
        {"pipeline_model_parallel_layout": "Et|ttt|L"},
    ),
    "interleaved, of uneven chunks": (
        "2 ranks: pp2 vpp2",
        {"pipeline_model_parallel_layout": "E|tt|t|tL"},
    ),
    "a short first stage": ("3 ranks: pp3", {"num_layers_in_first_pipeline_stage": 2}),
    "a short last stage": ("2 ranks: pp2", {"num_layers_in_last_pipeline_stage": 1}),
    "both given": (
        "2 ranks: pp2",
        {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1},
    ),
    "embedding and loss counted as layers": (
        "3 ranks: pp3",
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(RECIPE, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(("layout", "fields"), STAGES.values(), ids=list(STAGES))
def test_stages_of_any_lengths_train_as_one_rank(
    small: OneRank, tmp_path: Path, layout: str, fields: dict[str, Any]
) -> None:
    assert small.agrees_with(small.on(layout, tmp_path, **fields))


@pytest.mark.parametrize(
    ("layout", "micro_batch_size"),
    [("2 ranks: pp2", 8), ("2 ranks: pp2", 1), ("2 ranks: pp2 vpp2", 4), ("2 ranks: pp2 vpp2", 1)],
)
def test_any_number_of_micro_batches_gives_the_same_step(
    small: OneRank, tmp_path: Path, layout: str, micro_batch_size: int
) -> None:
    data = {"micro_batch_size": micro_batch_size}
    assert small.agrees_with(small.on(layout, tmp_path, data=data))


# Five micro-batches: an odd number, and no multiple of two stages.
GROUP = "microbatch_group_size_per_vp_stage"


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    recipe = changed(RECIPE, data={"global_batch_size": 10})
    return OneRank(recipe, tmp_path_factory.mktemp("five"))


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("2 ranks: pp2", {}),
        ("3 ranks: pp3", {"num_layers_in_first_pipeline_stage": 2}),
        ("2 ranks: pp2 vpp2", {GROUP: 5}),
        ("2 ranks: pp2 vpp2", {GROUP: 3}),
    ],
)
def test_micro_batches_that_are_no_multiple_of_the_stages_train_as_on_one_rank(
    five: OneRank, tmp_path: Path, layout: str, fields: dict[str, Any]
) -> None:
    """Interleaved, in whole groups, or with a rest that reaches all stages."""
    assert five.agrees_with(five.on(layout, tmp_path, **fields))


@pytest.mark.parametrize("group", [None, 4])
def test_a_rest_that_does_not_reach_all_stages_is_refused(
    five: OneRank, tmp_path: Path, group: int | None
) -> None:
    """In groups of two or of four, five micro-batches leave one, which Megatron-Core refuses."""
    with pytest.raises(LayoutError, match="interleaving needs micro-batches in whole groups") as no:
        five.on("2 ranks: pp2 vpp2", tmp_path, **({GROUP: group} if group else {}))
    assert "micro-batches 10 / (2 * 1) = 5" in str(no.value)


# Messages between two interleaved stages.

PAIRED_WRONGLY = {"overlap_p2p_comm": False, "batch_p2p_comm": True}


def test_batched_messages_between_two_interleaved_stages_give_wrong_gradients(
    small: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are Megatron-Core's defaults; nothing is reported."""
    with monkeypatch.context() as unguarded:
        unguarded.setattr(small_runs, "require_startable", lambda *_: None)
        metrics = small.on("2 ranks: pp2 vpp2", tmp_path / "unguarded", **PAIRED_WRONGLY)
    assert len(metrics) == RECIPE.training.steps
    assert grad_norms(metrics)[0] != pytest.approx(grad_norms(small.metrics)[0], rel=0.02)
    assert small.agrees_with(small.on("2 ranks: pp2 vpp2", tmp_path / "guarded"))


def test_they_are_refused(small: OneRank, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="interleaved stages need overlap_p2p_comm True"):
        small.on("2 ranks: pp2 vpp2", tmp_path, **PAIRED_WRONGLY)
