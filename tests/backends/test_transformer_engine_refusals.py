"""What Transformer Engine's kernels alone can do is refused, and what is left is what it does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_ranks import on_ranks
from te_gpt import Model

from mcore_lab.backends import choose_backend
from mcore_lab.errors import BackendError

ONLY_WITH_IT = {
    "fp8": "hybrid",
    "fp4": "e2m1",
    "cuda_graph_impl": "local",
    "delay_wgrad_compute": True,
    "gradient_accumulation_fusion": True,
    "tp_comm_overlap": True,
}


@on_ranks(1)
def test_what_only_its_kernels_can_do_is_refused() -> None:
    from megatron.core.extensions.transformer_engine import TENorm

    model = Model()
    with model.ranks():
        for setting, value in ONLY_WITH_IT.items():
            config = model.config()
            setattr(config, setting, value)
            with pytest.raises(BackendError, match=f"{setting}=.* is not installed.*{setting}="):
                TENorm(config, 32)


@pytest.mark.parametrize("experts", [None, 4])
@on_ranks(1)
def test_a_layer_under_fp8_is_refused_not_built_without_it(experts: int | None) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_layer import TransformerLayer

    model = Model(kind="grouped")
    with model.ranks():
        config = model.config()
        config.fp8 = "hybrid"
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None
        )
        with pytest.raises(BackendError, match="fp8='hybrid'"):
            TransformerLayer(config, spec.submodules)


@on_ranks(1)
def test_every_setting_in_the_way_is_named_at_once() -> None:
    from megatron.core.extensions.transformer_engine import TENorm

    model = Model()
    with model.ranks():
        config = model.config()
        config.fp8, config.tp_comm_overlap = "e4m3", True
        with pytest.raises(BackendError) as refusal:
            TENorm(config, 32)
        assert str(refusal.value) == (
            "fp8='e4m3', tp_comm_overlap=True needs Transformer Engine, which is not installed; "
            "the layers of its names are pure PyTorch here: fp8=None, tp_comm_overlap=False"
        )


@on_ranks(1)
def test_its_fused_mlp_is_refused_with_what_works() -> None:
    from megatron.core.extensions.transformer_engine import TEFusedMLP

    with pytest.raises(BackendError, match="use_te_op_fuser=False"):
        TEFusedMLP(None, None)


@on_ranks(1)
def test_its_linear_layers_refuse_what_they_do_with_it() -> None:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELinear

    model = Model()
    with model.ranks():
        arguments = {
            "config": model.config(),
            "init_method": torch.nn.init.zeros_,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
        }
        with pytest.raises(ValueError, match="gather_output"):
            TEColumnParallelLinear(32, 32, gather_output=True, **arguments)
        with pytest.raises(ValueError, match="TERowParallelLinear"):
            TELinear(32, 32, parallel_mode="row", **arguments)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@on_ranks(1)
def test_a_zero_centered_weight_is_one_less(normalization: str) -> None:
    from megatron.core.extensions.transformer_engine import TENorm

    model = Model()
    with model.ranks():
        norm, centered = model.config(), model.config()
        for config in (norm, centered):
            config.normalization = normalization
        centered.layernorm_zero_centered_gamma = True
        norm, centered = TENorm(norm, 32), TENorm(centered, 32)
        assert norm.weight.eq(1).all() and centered.weight.eq(0).all()
        x = torch.randn(3, 2, 32)
        torch.testing.assert_close(norm(x), centered(x), rtol=0, atol=0)


@on_ranks(1)
def test_its_activation_functions_are_those_of_torch() -> None:
    from megatron.core.extensions.transformer_engine import TEActivationOp

    model = Model(kind="rms")
    with model.ranks():
        config = model.config()
        gate, factor = torch.randn(2, 3, 8)
        swiglu = TEActivationOp(config)(torch.cat([gate, factor], dim=-1))
        torch.testing.assert_close(swiglu, F.silu(gate) * factor)
        config.gated_linear_unit = False
        with pytest.raises(BackendError, match="use_te_activation_func=False"):
            TEActivationOp(config)


@on_ranks(1)
def test_nothing_believes_that_transformer_engine_is_installed() -> None:
    from megatron.core.extensions import transformer_engine
    from megatron.core.utils import is_te_min_version

    assert not transformer_engine.HAVE_TE
    assert not is_te_min_version("0.1")
    assert choose_backend("auto", "cpu").name == "torch"
    with pytest.raises(BackendError, match="not installed"):
        choose_backend("te", "cpu")
