"""The lessons compute what Megatron-Core does: outputs and gradients, from the same weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from megatron_replicas import STEPS, replicas_on_rank
from megatron_twins import Differences, differences_on_rank

from mcore_lab.runtime import launch

SECONDS = 60
TOLERANCE = 1e-6

LAYERS = (
    "column-parallel linear",
    "row-parallel linear",
    "MLP",
    "attention",
    "attention, no mask",
    "block",
    "block, no mask",
    "embedding",
    "cross-entropy",
    "model",
)


@functools.cache
def layers(ranks: int) -> list[dict[str, Differences]]:
    return launch(differences_on_rank, ranks, ranks, timeout=SECONDS)


@functools.cache
def replicas() -> list[dict[str, Any]]:
    return launch(replicas_on_rank, 2, timeout=SECONDS)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_the_outputs_and_gradients_of_megatron_cores(layer: str, ranks: int) -> None:
    for of_rank in layers(ranks):
        assert "output" in of_rank[layer] and len(of_rank[layer]) > 1
        for what, difference in of_rank[layer].items():
            assert difference < TOLERANCE, what


@pytest.mark.parametrize("way", ["after", "overlapped"])
def test_data_parallel_gradients_are_those_of_megatron_cores_ddp(way: str) -> None:
    for of_rank in replicas():
        assert of_rank[way]["gradients"] < TOLERANCE


def test_overlap_begins_to_reduce_while_the_backward_goes_on() -> None:
    when = "last layer's reduction had begun when the backward came to the first"
    for of_rank in replicas():
        assert of_rank["after"][when] == [False, False]
        assert of_rank["overlapped"][when] == [True, True]
        assert of_rank["overlapped"]["buckets"] == 4


def test_sharded_adam_has_the_weights_of_megatron_cores_distributed_optimizer() -> None:
    for of_rank in replicas():
        assert of_rank["zero"]["weights"] < TOLERANCE
        assert of_rank["zero"]["moved by"] > STEPS * 1e-3
