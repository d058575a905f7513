"""Tokens that experts are given are counted once, whatever computes them and however often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank
from small_runs import SMALL, changed, loads

from mcore_lab.training.expert_balance import imbalance, worst_imbalance
from mcore_lab.training.track import numbers

EXPERTS = {
    "add_bias_linear": False,
    "moe_layer_freq": [0, 1],
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "mtp_num_layers": 2,
}
AGAIN = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    model = {
        "num_layers": 2,
        "num_moe_experts": 4,
        "position_embedding_type": "rope",
        "transformer": SMALL.model.transformer | EXPERTS,
    }
    recipe = changed(SMALL, model=model, training={"steps": 2})
    return OneRank(recipe, tmp_path_factory.mktemp("moe"))


def test_every_token_of_a_step_counts_for_each_expert_that_it_goes_to(moe: OneRank) -> None:
    tokens = SMALL.data.global_batch_size * SMALL.data.sequence_length
    for line in moe.metrics:
        load = line["tokens_per_expert"]
        # The first layer is dense; both of multi-token prediction are as the last is.
        assert list(load) == ["layer_2", "mtp_1", "mtp_2"]
        assert all(len(of_layer) == 4 and sum(of_layer) == 2 * tokens for of_layer in load.values())
        assert line["expert_imbalance"] == max(map(imbalance, load.values())) > 1


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("1 ranks:", AGAIN),
        ("2 ranks: pp2", {}),
        ("2 ranks: tp2 sp ep2 etp1", AGAIN),
    ],
    ids=["computed again", "pipeline stages", "computed again, on shares of a sequence"],
)
def test_counts_are_those_of_one_rank(
    moe: OneRank, tmp_path: Path, layout: str, fields: dict[str, Any]
) -> None:
    assert loads(moe.on(layout, tmp_path, **fields)) == loads(moe.metrics)


def test_the_imbalance_is_the_greatest_load_by_the_mean() -> None:
    assert imbalance([5, 5, 5]) == 1
    assert imbalance([0, 0, 9, 0]) == 4
    assert worst_imbalance({"layer_1": [3, 3], "layer_2": [1, 3]}) == 1.5
    assert worst_imbalance({}) is None
    assert imbalance([0, 0]) == 0


def test_a_tracker_is_told_the_imbalance_of_each_layer() -> None:
    line = {"step": 1, "expert_imbalance": 1.5, "tokens_per_expert": {"layer_2": [1, 3]}}
    assert numbers(line) == {"expert_imbalance": 1.5, "expert_imbalance/layer_2": 1.5}
    assert numbers({"step": 1, "tokens_per_expert": None}) == {}
