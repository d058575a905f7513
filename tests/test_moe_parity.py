"""Mixtures of experts train on every layout as on one rank.

All layouts, both kinds of experts and both dispatchers start from one checkpoint and are held
against one rank with sequential experts. Not compared are: `global_aux_loss`, which counts the
tokens of all data-parallel ranks and of the micro-batches before, and so is another loss on another
layout; capacity factors, which drop the tokens that a rank has too many of; and tensor parallelism
without sequence parallelism, which Megatron-Core refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron.core
import pytest
from one_rank import OneRank
from packaging.version import Version
from small_runs import SMALL, changed, losses

import mcore_lab.backends.experts
from mcore_lab.config import Recipe

WITH_BALANCE = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
BEFORE_0_19 = Version(megatron.core.__version__) < Version("0.19")

LAYOUTS = {
    "alltoall": [
        "2 ranks: ep2",
        "4 ranks: ep4",
        "2 ranks: etp2",
        "2 ranks: tp2 sp etp2",
        "2 ranks: tp2 sp etp1",
        "2 ranks: tp2 sp ep2 etp1",
        "4 ranks: tp2 sp ep2 etp2",
        "4 ranks: pp2 ep2",
        "4 ranks: etp2 ep2 zero",
    ],
    "allgather": [
        "2 ranks: ep2",
        "2 ranks: tp2 sp ep2 etp1",
        "4 ranks: etp2 ep2",
        "4 ranks: pp2 ep2",
    ],
}


def _moe(**transformer: Any) -> Recipe:
    fields = {
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "moe_ffn_hidden_size": 48,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    shape = {
        "num_layers": 2,
        "num_moe_experts": 4,
        "transformer": SMALL.model.transformer | fields | transformer,
    }
    return changed(SMALL, model=shape, training={"steps": 3})


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(_moe(), tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    recipe = _moe(add_bias_linear=True, gated_linear_unit=False, activation_func="gelu")
    return OneRank(recipe, tmp_path_factory.mktemp("biases"))


def test_the_run_that_all_are_held_against_learns(one_rank: OneRank) -> None:
    first, *_, last = losses(one_rank.metrics)
    assert last < first - 0.1


@pytest.mark.parametrize(
    ("dispatcher", "layout"),
    [(dispatcher, layout) for dispatcher in LAYOUTS for layout in LAYOUTS[dispatcher]],
)
def test_grouped_experts_train_as_sequential_ones_on_one_rank(
    one_rank: OneRank, tmp_path: Path, dispatcher: str, layout: str
) -> None:
    fields = {"moe_token_dispatcher_type": dispatcher, "moe_grouped_gemm": True}
    assert one_rank.agrees_with(one_rank.on(layout, tmp_path, **fields))


@pytest.mark.parametrize("layout", ["2 ranks: tp2 sp etp1", "4 ranks: etp2 ep2"])
def test_sequential_experts_do_too(one_rank: OneRank, tmp_path: Path, layout: str) -> None:
    assert one_rank.agrees_with(one_rank.on(layout, tmp_path))


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
def test_experts_with_biases_do_too(with_biases: OneRank, tmp_path: Path, grouped: bool) -> None:
    metrics = with_biases.on("2 ranks: tp2 sp ep2 etp1", tmp_path, moe_grouped_gemm=grouped)
    assert with_biases.agrees_with(metrics)


def test_without_the_marks_biases_learn_from_other_experts_tokens(
    with_biases: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcore_lab.backends.experts, "reduce_as_experts", lambda experts: None)
    metrics = with_biases.on("2 ranks: tp2 sp ep2 etp1", tmp_path)
    assert losses(metrics) != pytest.approx(losses(with_biases.metrics), rel=1e-3)


@pytest.mark.skipif(not BEFORE_0_19, reason="Megatron-Core 0.19 marks them")
@pytest.mark.parametrize("layout", ["2 ranks: tp2 sp etp1", "2 ranks: etp2"])
def test_without_the_marks_experts_split_unlike_dense_layers_learn_something_else(
    one_rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(mcore_lab.backends.experts, "reduce_as_experts", lambda experts: None)
    metrics = one_rank.on(layout, tmp_path)
    assert losses(metrics) != pytest.approx(losses(one_rank.metrics), rel=1e-3)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_router_s_losses_weigh_the_same_on_every_layout(kind: str, tmp_path: Path) -> None:
    """Both are means over whole micro-batches, which are the same on all of these."""
    fields = WITH_BALANCE | {"moe_router_load_balancing_type": kind, "moe_z_loss_coeff": 0.1}
    one_rank = OneRank(_moe(moe_grouped_gemm=True, **fields), tmp_path)
    for layout in ("2 ranks: ep2", "2 ranks: tp2 sp ep2 etp1", "2 ranks: pp2"):
        assert one_rank.agrees_with(one_rank.on(layout, tmp_path / layout)), layout


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_shared_experts_and_recomputation_change_nothing(dispatcher: str, tmp_path: Path) -> None:
    fields = {
        "moe_shared_expert_intermediate_size": 32,
        "moe_token_dispatcher_type": dispatcher,
        "moe_grouped_gemm": True,
    }
    one_rank = OneRank(_moe(**fields), tmp_path)
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    metrics = one_rank.on("4 ranks: tp2 sp ep2 etp2", tmp_path, **recomputed)
    assert one_rank.agrees_with(metrics)


def test_a_token_to_one_expert_with_its_probability_on_the_input(tmp_path: Path) -> None:
    fields = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
    one_rank = OneRank(_moe(moe_apply_probs_on_input=True, **fields), tmp_path)
    metrics = one_rank.on("2 ranks: ep2", tmp_path, moe_grouped_gemm=True)
    assert one_rank.agrees_with(metrics)
