"""The lesson's expert dispatch is Megatron-Core's: outputs, gradients and the auxiliary loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_lab import cpu
from mcore_lab.backends import Backend, decoder_block_spec
from mcore_lab.compat import take_auxiliary_losses
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout
from mcore_lab.lessons.expert_parallel import Experts, ExpertsOfRank, Settings, lesson
from mcore_lab.lessons.start import give
from mcore_lab.runtime import launch, model_parallel

cpu.preload()

from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SMALL = Settings(
    num_experts=4, topk=2, tokens=24, hidden_size=16, ffn_hidden_size=32, aux_loss_coeff=0.1
)


def of_megatron_core(layer: Experts, settings: Settings) -> Any:
    """Return Megatron-Core's MoE layer on two expert-parallel ranks, with the layer's weights."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=settings.hidden_size,
        num_attention_heads=4,
        num_moe_experts=settings.num_experts,
        moe_ffn_hidden_size=settings.ffn_hidden_size,
        moe_router_topk=settings.topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=settings.aux_loss_coeff,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        expert_model_parallel_size=2,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    spec = decoder_block_spec(config, Backend(name="torch", reason="it is what the CPU has"))
    moe = build_module(spec.layer_specs[0], config=config, layer_number=1).mlp
    with torch.no_grad():
        moe.router.weight.copy_(layer.router.weight)
        for ours, theirs in zip(layer.experts, moe.experts.local_experts, strict=True):
            theirs.linear_fc1.weight.copy_(ours.fc1)
            theirs.linear_fc2.weight.copy_(ours.fc2)
    return moe


def tokens_of(settings: Settings, rank: int) -> Tensor:
    """Return a rank's tokens `[t, h]`."""
    draw = torch.Generator().manual_seed(7)
    common = settings.alike * torch.randn(settings.hidden_size, generator=draw)
    draw.manual_seed(8 + rank)
    return torch.randn(settings.tokens, settings.hidden_size, generator=draw) + common


def of_lesson(layer: Experts, tokens: Tensor, coeff: float) -> dict[str, Tensor]:
    """Return what a step on a rank's tokens gives: output, auxiliary loss, and gradients."""
    tokens.requires_grad_()
    output, aux_loss = layer(tokens)
    (output.square().mean() + coeff * aux_loss).backward()
    return {"output": output.detach(), "aux loss": aux_loss.detach()} | gradients(
        tokens, layer.router, [(expert.fc1, expert.fc2) for expert in layer.experts]
    )


def of_twin(moe: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the same of Megatron-Core's layer, which adds the auxiliary loss's gradient itself."""
    tokens.requires_grad_()
    output, _ = moe(tokens.unsqueeze(1))
    output.square().mean().backward()
    weights = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in moe.experts.local_experts]
    # Of the two ranks, the mean.
    [aux_loss] = take_auxiliary_losses()["load_balancing_loss"]
    return {"output": output.detach().squeeze(1), "aux loss": torch.tensor(aux_loss)} | gradients(
        tokens, moe.router, weights
    )


def gradients(tokens: Tensor, router: Any, experts: list[Any]) -> dict[str, Tensor]:
    """Return all gradients by name; an expert of Megatron-Core that got no token may have none."""
    found = {"d tokens": tokens.grad, "d router": router.weight.grad}
    for number, weights in enumerate(experts):
        for name, weight in zip(("fc1", "fc2"), weights, strict=True):
            found[f"d {name} of expert {number}"] = weight.grad
    assert found["d tokens"] is not None and found["d router"] is not None
    return {name: torch.tensor(0.0) if x is None else x.clone() for name, x in found.items()}


CASES = {
    "two of four": SMALL,
    "one of four": replace(SMALL, topk=1),
    "all of four": replace(SMALL, topk=4),
    "the same for all": replace(SMALL, alike=50.0),
}


def two_ranks() -> dict[str, Any]:
    """Return, for each case, what a rank gets from the lesson and from its twin."""
    found = {}
    with model_parallel(ParallelLayout(expert_model_parallel_size=2)) as world:
        for name, settings in CASES.items():
            layer = ExpertsOfRank(settings, range(2 * world.rank, 2 * world.rank + 2))
            moe = of_megatron_core(layer, settings)
            tokens = tokens_of(settings, world.rank)
            found[name] = {
                "lesson": of_lesson(layer, tokens.clone(), settings.aux_loss_coeff),
                "Megatron-Core": of_twin(moe, tokens.clone()),
                "arrived": layer.arrived.sum(0).tolist(),
            }
    return found


@pytest.fixture(scope="module")
def layers() -> list[dict[str, Any]]:
    return launch(two_ranks, 2, timeout=60)


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_megatron_cores_all_to_all_dispatcher(
    layers: list[dict[str, Any]], case: str
) -> None:
    for rank in layers:
        ours, theirs = rank[case]["lesson"], rank[case]["Megatron-Core"]
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"aux loss"}:
            off = (ours[name] - theirs[name]).abs().max()
            assert off <= 1e-6 * theirs[name].abs().max(), name


@pytest.mark.parametrize("case", CASES)
def test_the_auxiliary_loss_is_that_of_megatron_cores_router(
    layers: list[dict[str, Any]], case: str
) -> None:
    ours = torch.stack([rank[case]["lesson"]["aux loss"] for rank in layers]).mean().item()
    for rank in layers:
        assert rank[case]["Megatron-Core"]["aux loss"].item() == pytest.approx(ours, rel=1e-6)


def test_the_cases_are_even_uneven_and_without_tokens_for_some_experts(
    layers: list[dict[str, Any]],
) -> None:
    arrived = {case: [n for rank in layers for n in rank[case]["arrived"]] for case in CASES}
    assert all(sum(arrived[case]) == 2 * 24 * CASES[case].topk for case in CASES)
    assert arrived["all of four"] == [48] * 4
    assert len(set(arrived["two of four"])) > 1
    assert sorted(arrived["the same for all"]) == [0, 0, 48, 48]


# What the lesson shows.


def shown(ranks: int, **settings: Any) -> dict[str, Any]:
    """Return what the lesson finds on few tokens."""
    small = Settings(**{"tokens": 32, "hidden_size": 16, "ffn_hidden_size": 32} | settings)
    found = launch(give, ranks, lesson, small, True, timeout=60, megatron_core=False)[0]
    assert found
    return found


def test_tokens_and_bytes_are_counted() -> None:
    ranks = shown(4, num_experts=4, topk=4)["ranks"]
    assert [rank["experts"] for rank in ranks] == [[0], [1], [2], [3]]
    assert [rank["tokens of each"] for rank in ranks] == [[128]] * 4
    # Each token goes to all four ranks: 3 · 32 rows leave, and as many go back.
    assert [rank["bytes sent"] for rank in ranks] == [2 * 3 * 32 * 16 * 4] * 4
    assert [rank["auxiliary loss"] for rank in ranks] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(("size", "experts"), [(1, 8), (3, 9)])
def test_it_computes_what_one_rank_does_with_all_experts(size: int, experts: int) -> None:
    ranks = shown(size, num_experts=experts)["ranks"]
    assert max(rank["output off by"] for rank in ranks) < 1e-6
    assert max(rank["gradients off by"] for rank in ranks) < 2e-6
    assert [rank["in all"] for rank in ranks] == [sum(rank["tokens of each"]) for rank in ranks]
    assert sum(rank["in all"] for rank in ranks) == size * 32 * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4}, "3 ranks cannot share --num-experts 4 evenly; 6 would do"),
        ({"num_experts": 3, "topk": 4}, "--topk must not be above --num-experts, 3; it is 4"),
    ],
)
def test_what_the_layer_cannot_be_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shown(3, **settings)
