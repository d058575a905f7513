"""The layer-level recipes: one layer over several ranks is that layer on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import changed

from mcore_lab.cli.arguments import usual_world
from mcore_lab.config import Recipe, RunArguments
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import load_recipe
from mcore_lab.recipes.start import require_startable, run_rank
from mcore_lab.runtime import launch
from mcore_lab.runtime.memory import TensorMemory


def ranks_of(recipe: Recipe, nproc: int | None = None) -> list[dict[str, Any]]:
    arguments = RunArguments(recipe=recipe, run_dir=Path("unused"), json=True)
    nproc = nproc or usual_world(recipe)
    require_startable(arguments, nproc)
    return launch(run_rank, nproc, arguments, timeout=60)[0].ranks


def assert_as_on_one_rank(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["output"] < 1e-5
        assert row.get("gradient", 0.0) < 1e-5


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_feed_forward_layer_is_split_by_columns_and_then_by_rows(sequence_parallel: bool):
    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    rows = ranks_of(replace(load_recipe("tp_mlp"), layout=layout))
    assert_as_on_one_rank(rows)
    assert [row["linear_fc1.weight"] for row in rows] == [[256, 128]] * 2
    assert [row["linear_fc2.weight"] for row in rows] == [[128, 256]] * 2


@pytest.mark.parametrize(("comm_type", "share"), [("p2p", 0.8), ("a2a", 0.8), ("all_gather", 0.95)])
def test_attention_over_a_long_sequence_holds_a_part_of_one_ranks_memory(
    comm_type: str, share: float
):
    recipe = load_recipe("cp_attention")
    transformer = {**recipe.model.transformer, "cp_comm_type": comm_type}
    recipe = changed(
        recipe, model={"transformer": transformer}, data={"sequence_length": 4095}, layout={}
    )
    rows = ranks_of(recipe.with_layout(context_parallel_size=2))
    assert_as_on_one_rank(rows)
    assert [row["tokens"] for row in rows] == [2048] * 2
    assert all(row["peak MiB"] < share * row["one rank's MiB"] for row in rows)


@pytest.mark.parametrize("grouped", [True, False])
def test_each_token_reaches_the_experts_that_its_router_chose(grouped: bool):
    recipe = load_recipe("ep_moe_layer")
    transformer = {**recipe.model.transformer, "moe_grouped_gemm": grouped}
    rows = ranks_of(changed(recipe, model={"transformer": transformer}))
    assert_as_on_one_rank(rows)
    assert [row["experts"] for row in rows] == [[0, 1], [2, 3]]
    sent = torch.tensor([row["sent to each expert"] for row in rows]).sum(0).tolist()
    assert [n for row in rows for n in row["tokens of each held expert"]] == sent
    assert sum(sent) == 2 * sum(row["own tokens"] for row in rows)


def test_what_a_layer_does_not_show_is_said_in_a_line():
    gated = {"gated_linear_unit": True, "add_bias_linear": False}
    with pytest.raises(ConfigError, match="tp_mlp shows a dense layer without a gated unit"):
        ranks_of(changed(load_recipe("tp_mlp"), model={"transformer": gated}))
    with pytest.raises(ConfigError, match="no pipeline splits: --pp 1"):
        recipe = changed(load_recipe("tp_mlp"), model={"num_layers": 2})
        ranks_of(recipe.with_layout(pipeline_model_parallel_size=2), 4)


def test_memory_counts_storages_once_until_they_are_freed():
    weight = torch.ones(1000, requires_grad=True)
    with TensorMemory() as memory:
        doubled = weight * 2
        assert memory.held == 4000
        doubled.view(10, 100).add_(1)
        assert memory.held == memory.peak == 4000
        doubled.exp().sum().backward()
        assert weight.grad is not None
        # exp's result, its gradient spread from the sum's, and the two products on the way back.
        assert memory.peak >= 3 * 4000
        del doubled
        assert memory.held == 4000, "only the weight's gradient is left"
