"""Mixtures of experts train on every layout as on one rank, their auxiliary losses on.

Of those, by definition:

- `seq_aux_loss` is a mean over sequences, and the router's z-loss one over tokens: neither depends
  on the layout, nor on how samples are cut into micro-batches. It is on in all tests here.
- `aux_loss` is a mean over the tokens of a micro-batch, gathered over tensor- and context-parallel
  ranks: it depends on which samples are in a micro-batch together, and on nothing else.
- `global_aux_loss` counts the tokens of all replicas' micro-batches so far in the step, and each
  replica adds its share of it: it depends on their number, and on that of micro-batches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from one_rank import LOSS, NORM, OneRank
from small_runs import SMALL, changed, grad_norms, loads, losses

EXPERTS = {
    "add_bias_linear": False,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.01,
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}
ALL_TO_ALL = (
    "2 ranks: ep2",
    "2 ranks: cp2 ep2",
    "4 ranks: ep2 etp2",
    "4 ranks: tp2 sp ep2 etp2 zero",
    "4 ranks: tp2 sp ep2 etp1 zero",
    "4 ranks: tp2 sp cp2 ep4 etp1",
    "4 ranks: tp2 sp pp2 ep2 etp1",
    "4 ranks: pp2 vpp2 ep2",
)
ALL_GATHER = (
    "2 ranks: tp2 sp ep2 etp1",
    "4 ranks: ep2 etp2",
    "4 ranks: tp2 sp cp2 ep2 etp2",
)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    shape = {"num_moe_experts": 4, "position_embedding_type": "rope"}
    model = shape | {"transformer": SMALL.model.transformer | EXPERTS}
    recipe = changed(SMALL, model=model, training={"steps": 3})
    return OneRank(recipe, tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("layout", ALL_TO_ALL)
def test_tokens_that_travel_all_to_all_train_as_on_one_rank(
    moe: OneRank, tmp_path: Path, layout: str
) -> None:
    assert losses(moe.metrics)[-1] < losses(moe.metrics)[0] - 0.1
    metrics = moe.on(layout, tmp_path)
    assert moe.agrees_with(metrics)
    assert loads(metrics) == loads(moe.metrics)


@pytest.mark.parametrize("layout", ALL_GATHER)
def test_tokens_that_are_gathered_train_as_on_one_rank(
    moe: OneRank, tmp_path: Path, layout: str
) -> None:
    metrics = moe.on(layout, tmp_path, moe_token_dispatcher_type="allgather")
    assert moe.agrees_with(metrics)
    assert loads(metrics) == loads(moe.metrics)


def test_sequential_experts_train_as_grouped_ones(moe: OneRank, tmp_path: Path) -> None:
    assert moe.agrees_with(moe.on("2 ranks: ep2", tmp_path, moe_grouped_gemm=False))


def test_tokens_of_one_expert_each_train_as_on_one_rank(moe: OneRank, tmp_path: Path) -> None:
    one, two = (
        moe.on(layout, tmp_path / layout, moe_router_topk=1, moe_router_pre_softmax=True)
        for layout in ("1 ranks:", "2 ranks: ep2")
    )
    assert grad_norms(one) != pytest.approx(grad_norms(moe.metrics), rel=1e-2)
    assert losses(two) == pytest.approx(losses(one), rel=LOSS)
    assert grad_norms(two) == pytest.approx(grad_norms(one), rel=NORM)


# Auxiliary losses.


def test_that_of_sequences_is_part_of_the_gradient_and_the_same_for_any_micro_batches(
    moe: OneRank, tmp_path: Path
) -> None:
    without = moe.on("1 ranks:", tmp_path / "without", moe_router_load_balancing_type="none")
    assert grad_norms(without) != pytest.approx(grad_norms(moe.metrics), rel=10 * NORM)
    assert moe.agrees_with(moe.on("1 ranks:", tmp_path, data={"micro_batch_size": 4}))


def test_that_of_micro_batches_is_the_same_on_any_layout_and_not_for_other_micro_batches(
    moe: OneRank, tmp_path: Path
) -> None:
    kind = {"moe_router_load_balancing_type": "aux_loss"}
    one = grad_norms(moe.on("1 ranks:", tmp_path / "one", **kind))
    many = moe.on("4 ranks: tp2 sp ep2 etp1", tmp_path / "many", **kind)
    cut = moe.on("1 ranks:", tmp_path / "cut", data={"micro_batch_size": 4}, **kind)
    assert grad_norms(many) == pytest.approx(one, rel=NORM)
    assert grad_norms(cut) != pytest.approx(one, rel=10 * NORM)


def test_that_of_all_replicas_depends_on_their_number(moe: OneRank, tmp_path: Path) -> None:
    kind = {"moe_router_load_balancing_type": "global_aux_loss"}
    one, split, replicas = (
        grad_norms(moe.on(layout, tmp_path / layout, **kind))
        for layout in ("1 ranks:", "4 ranks: tp2 sp cp2", "2 ranks: ep2")
    )
    assert split == pytest.approx(one, rel=NORM)
    assert replicas != pytest.approx(one, rel=10 * NORM)
