"""A whole GPT over ranks that share its sequences has one rank's loss and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cp_gpt import Model, Outcome, loss_and_gradients

from mcore_lab.runtime import launch

SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
}


def assert_same(of_ranks: list[Outcome], of_one: Outcome, tp: int) -> None:
    """Hold each rank's gradients, its part of those that are split, to one rank's."""
    for rank, found in enumerate(of_ranks):
        assert found.loss == pytest.approx(of_one.loss, rel=1e-6)
        assert found.grads.keys() == of_one.grads.keys()
        for name, grad in found.grads.items():
            expected = of_one.grads[name]
            if name in found.split and tp > 1:
                expected = expected.chunk(tp, dim=found.split[name])[rank % tp]
            largest = of_one.grads[name].abs().max().item()
            torch.testing.assert_close(
                grad, expected, rtol=0, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


def check(model: Model) -> None:
    alone = replace(model, tp=1, cp=1, hierarchy=None)
    [of_one] = launch(loss_and_gradients, 1, alone, timeout=60)
    of_ranks = launch(loss_and_gradients, model.tp * model.cp, model, timeout=60)
    assert_same(of_ranks, of_one, model.tp)


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_tensor_and_context_parallel_ranks_are_one(comm_type: str) -> None:
    check(Model(tp=2, cp=2, fields={"cp_comm_type": comm_type}))


def test_a_hierarchy_of_ranks_is_one_rank() -> None:
    check(Model(cp=4, hierarchy=[2, 2], fields={"cp_comm_type": "a2a+p2p"}))


def test_learned_positions_are_those_of_the_whole_sequence() -> None:
    check(Model(cp=2, position_embedding_type="learned_absolute"))


def test_the_ring_goes_round_again_when_attention_is_recomputed() -> None:
    check(Model(cp=2, fields=SELECTIVE))


def test_multi_latent_attention_is_shared_too() -> None:
    check(Model(cp=2, fields=LATENT))


@pytest.mark.parametrize("fields", [{}, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
def test_packed_documents_are_shared_too(comm_type: str, fields: dict[str, object]) -> None:
    check(Model(cp=2, documents=(8, 20, 4), fields={"cp_comm_type": comm_type, **fields}))


@pytest.mark.parametrize("fields", [{}, LATENT], ids=["grouped", "latent"])
def test_packed_documents_are_what_megatron_cores_own_attention_makes_of_each(
    fields: dict[str, object],
) -> None:
    packed = Model(documents=(12, 3, 17), fields=fields)
    [of_pack], [of_each] = (
        launch(loss_and_gradients, 1, model, timeout=60)
        for model in (packed, replace(packed, packed=False))
    )
    assert_same([of_pack], of_each, tp=1)
