"""Experts in one grouped product compute, train and save what experts one after the other do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from one_rank import layout_of
from small_runs import SMALL, changed, grad_norms, losses, run

from mcore_lab import cpu
from mcore_lab.config import Recipe

cpu.preload()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

import mcore_lab.backends.grouped_linear  # noqa: E402
from mcore_lab.backends.experts import GroupedExperts, SequentialExperts  # noqa: E402
from mcore_lab.backends.grouped_linear import grouped_product  # noqa: E402

TOKENS_PER_EXPERT = ([5, 0, 9, 2], [0, 0, 0, 7], [0, 0, 0, 0])
EXPERTS, HIDDEN, WIDTH = 4, 32, 48


def looped(tokens: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = zip(tokens.split(counts), weight, strict=True)
    return torch.cat([part @ of_expert.t() for part, of_expert in parts])


def with_gradients(
    product: Any, tokens: torch.Tensor, weight: torch.Tensor, counts: list[int]
) -> list[torch.Tensor]:
    """Return a product, and the gradients of what it is of."""
    tokens, weight = tokens.clone().requires_grad_(), weight.clone().requires_grad_()
    output = product(tokens, weight, counts)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output, tokens.grad, weight.grad]


@pytest.mark.parametrize("counts", TOKENS_PER_EXPERT, ids=str)
@pytest.mark.parametrize("width", [WIDTH, 7])
def test_a_grouped_product_is_that_of_a_loop(counts: list[int], width: int) -> None:
    """With sizes that torch's own grouped product takes, and with others, which are padded."""
    tokens, weight = torch.randn(sum(counts), HIDDEN), torch.randn(EXPERTS, width, HIDDEN)
    expected = with_gradients(looped, tokens, weight, counts)
    for ours, theirs in zip(
        with_gradients(grouped_product, tokens, weight, counts), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_size_goes_the_way_that_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    module = mcore_lab.backends.grouped_linear
    padded = module._padded_product
    monkeypatch.setattr(
        module, "_padded_product", lambda *a, **k: (ways.append("padded"), padded(*a, **k))[1]
    )
    for width in (WIDTH, 7):
        grouped_product(torch.randn(3, HIDDEN), torch.randn(2, width, HIDDEN), [1, 2])
        ways.append(str(width))
    assert hasattr(torch, "_grouped_mm")
    assert ways == ["48", "padded", "7"]


def test_a_grouped_product_takes_gradients_of_any_strides() -> None:
    tokens, weight = torch.randn(6, HIDDEN), torch.randn(2, WIDTH, HIDDEN)
    found = []
    for product in (grouped_product, looped):
        leaf = weight.clone().requires_grad_()
        product(tokens, leaf, [2, 4]).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"add_bias_linear": True},
    "gated": {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
    "gated bias": {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": True,
    },
    "bf16": {"bf16": True, "params_dtype": torch.bfloat16},
}
# Of expert and expert-tensor parallelism.
WHERE = {"ep1": (1, 1), "ep2": (2, 1), "etp2": (1, 2)}


def built(kind: type, fields: dict[str, Any], ep: int, etp: int) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        moe_ffn_hidden_size=WIDTH,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        moe_grouped_gemm=kind is GroupedExperts,
        use_cpu_initialization=True,
        **{"add_bias_linear": False} | fields,
    )
    linears = MLPSubmodules(
        linear_fc1=tensor_parallel.ColumnParallelLinear,
        linear_fc2=tensor_parallel.RowParallelLinear,
    )
    return kind(EXPERTS // ep, config, linears, pg_collection=get_default_pg_collection())


def stacked(experts: torch.nn.Module) -> dict[str, torch.nn.Parameter | torch.Tensor]:
    """Return each parameter of all local experts as one tensor, or its gradient, as grouped has."""
    parameters = [dict(one.named_parameters()) for one in experts.local_experts]
    return {name: torch.stack([one[name] for one in parameters]) for name in parameters[0]}


def forward_backward(
    experts: torch.nn.Module, tokens: torch.Tensor, probs: torch.Tensor, counts: list[int]
) -> list[torch.Tensor]:
    tokens, probs = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
    output, bias = experts(tokens, torch.tensor(counts), probs)
    assert bias is None
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output, tokens.grad, probs.grad]


@pytest.mark.parametrize("where", WHERE)
def test_grouped_experts_compute_what_sequential_ones_do(where: str) -> None:
    """Outputs, and the gradients of tokens, probabilities and every parameter."""
    ep, etp = WHERE[where]
    on_ranks(ep * etp)(_same_as_sequential)(ep=ep, etp=etp)


def _same_as_sequential(ep: int, etp: int) -> None:
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=etp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(2 + torch.distributed.get_rank())
    for name, fields in KINDS.items():
        # Megatron-Core refuses a bias of experts that are split.
        if etp == 1 or not fields.get("add_bias_linear"):
            for counts in ([5, 0, 9, 2], [0, 0, 0, 7]):
                _require_same(name, fields, counts[: EXPERTS // ep], ep, etp)


def _require_same(kind: str, fields: dict[str, Any], counts: list[int], ep: int, etp: int) -> None:
    sequential, grouped = (
        built(experts, fields, ep, etp) for experts in (SequentialExperts, GroupedExperts)
    )
    for name, parameter in sequential.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    weights = stacked(sequential)
    assert weights.keys() == dict(grouped.named_parameters()).keys()
    grouped.load_state_dict(weights, strict=False)
    tokens = torch.randn(sum(counts), HIDDEN, dtype=fields.get("params_dtype"))
    probs = torch.rand(sum(counts))
    ours, theirs = (
        forward_backward(experts, tokens, probs, counts) for experts in (grouped, sequential)
    )
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in fields else {"rtol": 1e-6, "atol": 1e-6}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance, msg=lambda text: f"{kind}: {text}")
    for name, parameter in grouped.named_parameters():
        of_experts = [dict(one.named_parameters())[name] for one in sequential.local_experts]
        torch.testing.assert_close(
            gradient_of(parameter),
            torch.stack([gradient_of(one) for one in of_experts]),
            **tolerance,
            msg=lambda text, name=name: f"{kind}, {name}: {text}",
        )


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a parameter's gradient; an expert without tokens may have none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# Checkpoints.

NO_DROPOUT = SMALL.model.transformer
GATED = {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
SEQUENTIAL, GROUPED = False, True


def halfway(folder: Path) -> Recipe:
    """Return a run of four steps that saves after two, from initial weights in the folder."""
    recipe = changed(
        SMALL,
        model={"num_layers": 2, "num_moe_experts": 4, "transformer": NO_DROPOUT | GATED},
        training={"steps": 4},
    )
    run(changed(recipe, training={"steps": 0}), 1, folder / "initial")
    return changed(recipe, checkpoint={"load": str(folder / "initial"), "save_every": 2})


def train(recipe: Recipe, grouped: bool, layout: str, folder: Path) -> list[dict[str, Any]]:
    nproc, sizes = layout_of(layout)
    fields = recipe.model.transformer | {"moe_grouped_gemm": grouped}
    return run(changed(recipe, model={"transformer": fields}, layout=sizes), nproc, folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a run of sequential experts on one rank, and what kinds and layouts have saved."""
    folder = tmp_path_factory.mktemp("halfway")
    recipe = halfway(folder)
    whole = train(recipe, SEQUENTIAL, "1 ranks:", folder / "sequential")
    short = changed(recipe, training={"steps": 2})
    train(short, GROUPED, "2 ranks: ep2 zero", folder / "grouped zero")
    saved = {
        name: str(folder / name / "checkpoints" / "step-00000002")
        for name in ("sequential", "grouped zero")
    }
    return saved | {"recipe": recipe, "whole": whole}


@pytest.mark.parametrize(
    ("of", "grouped", "layout"),
    [
        ("sequential", GROUPED, "2 ranks: ep2"),
        ("grouped zero", SEQUENTIAL, "1 ranks: zero"),
        ("grouped zero", GROUPED, "2 ranks: tp2 sp etp2 zero"),
        ("grouped zero", SEQUENTIAL, "2 ranks: tp2 sp ep2 etp1 zero"),
    ],
)
def test_either_kind_goes_on_from_the_other_s_checkpoint_on_another_layout(
    written: dict[str, Any], tmp_path: Path, of: str, grouped: bool, layout: str
) -> None:
    """With the optimizer's state: losses and gradient norms are those of a run without a break."""
    recipe = changed(
        written["recipe"],
        training={"resume": written[of]},
        checkpoint={"load": None, "save": False},
    )
    metrics, whole = train(recipe, grouped, layout, tmp_path / "run"), written["whole"][2:]
    assert [line["step"] for line in metrics] == [3, 4]
    assert losses(metrics) == pytest.approx(losses(whole), rel=1e-5)
    assert grad_norms(metrics) == pytest.approx(grad_norms(whole), rel=1e-4)
