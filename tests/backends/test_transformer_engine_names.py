"""Megatron-Core's Transformer Engine specs run without it, and nothing in them has another name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from te_gpt import CP2, TP2, Model, Outcome, loss_and_gradients, sequential_name, step

from mcore_lab.runtime import launch

ATTENTION = [
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
]
MLP = ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
MOE = [
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
]
BIASES = [
    "mlp.linear_fc1.bias",
    "mlp.linear_fc1.layer_norm_bias",
    "mlp.linear_fc2.bias",
    "self_attention.linear_proj.bias",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_qkv.layer_norm_bias",
]
LAYER_NORM = ["self_attention.linear_qkv.layer_norm_bias", "pre_mlp_layernorm.bias"]
NORM = ("weight", "bias")
LINEARS = ("linear_fc1", "linear_fc2")

LAYERS = {
    "dense": [*ATTENTION, *MLP, *BIASES],
    "rms": [
        *ATTENTION,
        *MLP,
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
    ],
    "experts": [
        *ATTENTION,
        *MOE,
        *LAYER_NORM,
        *(f"mlp.experts.local_experts.{e}.{fc}.weight" for e in range(4) for fc in LINEARS),
    ],
    "grouped": [
        *ATTENTION,
        *MOE,
        *LAYER_NORM,
        *(f"mlp.experts.{fc}.weight{e}" for e in range(4) for fc in LINEARS),
    ],
    "latent": [
        *MLP,
        "input_layernorm.weight",
        "self_attention.linear_proj.weight",
        "self_attention.linear_q_down_proj.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.linear_q_up_proj.weight",
        "self_attention.linear_kv_down_proj.weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.weight",
    ],
}
"""Parameters of the last layer as Transformer Engine's layers have them."""

TE_TO_TORCH = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "linear_q_up_proj.layer_norm_": "q_layernorm.",
    "linear_kv_up_proj.layer_norm_": "kv_layernorm.",
}


@pytest.mark.parametrize("kind", LAYERS)
@on_ranks(1)
def test_parameters_have_transformer_engines_names(kind: str) -> None:
    with Model(kind=kind).ranks() as gpt:
        names = [name for name, _ in gpt.decoder.layers[1].named_parameters()]
        assert sorted(names) == sorted(LAYERS[kind])


@on_ranks(1)
def test_predicting_layers_have_transformer_engines_names() -> None:
    with Model(kind="predicting").ranks() as gpt:
        [layer] = gpt.mtp.layers
        norms = [f"{norm}norm.{name}" for norm in ("e", "h", "final_layer") for name in NORM]
        # Megatron-Core names the layer in it transformer_layer, and mtp_model_layer in 0.19.
        names = [name.rpartition("_layer.")[2] for name, _ in layer.named_parameters()]
        assert sorted(names) == sorted([*norms, "eh_proj.weight", *LAYERS["dense"]])


@on_ranks(1)
def test_a_fused_norm_comes_before_its_linear_layer_as_optimizers_number_parameters() -> None:
    with Model().ranks() as gpt:
        names = [name for name, _ in gpt.decoder.layers[0].mlp.linear_fc1.named_parameters()]
        assert names == ["layer_norm_weight", "layer_norm_bias", "weight", "bias"]


def torch_name(name: str) -> str:
    """Return a parameter's name in the torch backend, whose experts are sequential."""
    for theirs, ours in TE_TO_TORCH.items():
        name = name.replace(theirs, ours)
    return sequential_name(name)


def compare_with_torch_backend(kind: str, sizes: dict[str, Any]) -> None:
    """Give the GPT of one spec the weights of the other's; take a step with both."""
    with Model(kind=kind, sizes=sizes).ranks() as gpt:
        sequential = kind.replace("grouped", "experts")
        other = Model(kind=sequential, transformer_engine=False, sizes=sizes).build(seed=12)
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in gpt.named_parameters():
                parameter.add_(torch.randn_like(parameter) / 50)
                theirs.pop(torch_name(name)).copy_(parameter)
        assert not theirs
        found, expected = step(gpt), step(other)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        for name, grad in found.grads.items():
            largest = float(expected.grads[torch_name(name)].abs().max())
            assert largest > 0
            torch.testing.assert_close(
                grad, expected.grads[torch_name(name)], rtol=0, atol=1e-6 * largest
            )


@pytest.mark.parametrize("kind", ["dense", "rms", "experts", "grouped", "latent", "predicting"])
@on_ranks(1)
def test_a_step_is_that_of_the_torch_backend(kind: str) -> None:
    compare_with_torch_backend(kind, {})


@pytest.mark.parametrize("kind", ["dense", "rms", "experts", "grouped"])
@on_ranks(2)
def test_a_step_on_two_ranks_is_that_of_the_torch_backend(kind: str) -> None:
    compare_with_torch_backend(kind, TP2)


def check_against_one_rank(kind: str, sizes: dict[str, Any]) -> None:
    [of_one] = launch(loss_and_gradients, 1, Model(kind=kind), timeout=60)
    of_ranks: list[Outcome] = launch(
        loss_and_gradients, 2, Model(kind=kind, sizes=sizes), timeout=60
    )
    for rank, found in enumerate(of_ranks):
        assert found.loss == pytest.approx(of_one.loss, rel=1e-6)
        for name, grad in found.grads.items():
            expected = of_one.grads[name]
            largest = float(expected.abs().max())
            if name in found.split and "tensor_model_parallel_size" in sizes:
                expected = expected.chunk(2, dim=found.split[name])[rank]
            torch.testing.assert_close(
                grad, expected, rtol=0, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["dense", "latent"])
def test_tensor_parallel_ranks_are_one(kind: str) -> None:
    check_against_one_rank(kind, TP2)


@pytest.mark.parametrize("kind", ["rms", "latent"])
def test_context_parallel_ranks_are_one(kind: str) -> None:
    check_against_one_rank(kind, CP2)


@on_ranks(2)
def test_a_spec_of_one_layer_ends_in_a_norm_that_takes_sequence_parallelism() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    model = Model(sizes=TP2)
    with model.ranks() as gpt:
        torch.manual_seed(11)
        spec = get_gpt_layer_with_transformer_engine_spec()
        other = GPTModel(
            model.config(),
            spec,
            vocab_size=64,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        )
        assert step(other).loss == step(gpt).loss


@on_ranks(1)
def test_bert_computes_the_same_with_its_transformer_engine_spec_as_with_its_local_one() -> None:
    from megatron.core.models.bert.bert_layer_specs import (
        bert_layer_local_spec,
        get_bert_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.bert.bert_model import BertModel

    model = Model()
    with model.ranks():
        specs = (bert_layer_local_spec, get_bert_layer_with_transformer_engine_spec())
        local, te = (BertModel(model.config(), 0, spec, 64, 16) for spec in specs)
        renamed = {
            name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
                "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
            ): value
            for name, value in local.named_parameters()
        }
        assert sorted(renamed) == sorted(name for name, _ in te.named_parameters())
        te.load_state_dict(renamed, strict=False)
        tokens = torch.arange(24).view(2, 12)
        keep = torch.ones(2, 12, dtype=torch.bool)
        keep[1, 8:] = False
        expected, got = (bert(tokens, keep) for bert in (local, te))
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@on_ranks(1)
def test_t5s_transformer_engine_specs_name_layers_that_can_be_built() -> None:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    for make in (
        t5_spec.encoder_model_with_transformer_engine_default_spec,
        t5_spec.decoder_model_with_transformer_engine_default_spec,
    ):
        attention: Any = make().submodules.self_attention
        assert isinstance(attention, ModuleSpec)
        assert attention.submodules.linear_qkv.__name__ == "TELayerNormColumnParallelLinear"


@on_ranks(1)
def test_layers_draw_weights_where_nothing_has_been_seeded() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from mcore_lab.backends.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
    )

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    config = Model(kind="grouped").config()
    config.use_cpu_initialization = False
    weights = [
        TEColumnParallelLinear(
            8,
            8,
            config=config,
            init_method=torch.nn.init.normal_,
            gather_output=False,
            is_expert=is_expert,
            bias=False,
            skip_bias_add=False,
        ).weight
        for is_expert in (False, False, True)
    ]
    grouped = TEColumnParallelGroupedLinear(
        2,
        8,
        8,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
    )
    weights += [grouped.weight0[:8], grouped.weight1[:8]]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 5
    assert not get_cuda_rng_tracker().is_initialized()


@on_ranks(2)
def test_a_layer_of_a_model_that_was_pruned_is_one_linear_layer_whose_output_is_whole() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.heterogeneous import heterogeneous_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    kind = heterogeneous_layer_specs.TELayerNormColumnParallelLinearGathered
    layer = kind(config, "linear_attn")
    x = torch.randn(3, 1, 8)
    output, bias = layer(x)
    assert output.shape == x.shape and bias is None

    weights = [torch.empty_like(layer.weight) for _ in range(2)]
    dist.all_gather(weights, layer.weight.detach())
    normal = torch.nn.functional.layer_norm(x, (8,))
    torch.testing.assert_close(output, normal @ torch.cat(weights).T)


@on_ranks(1)
def test_vision_models_have_a_norm_that_takes_what_they_give_it() -> None:
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel

    from mcore_lab.backends.transformer_engine import TENorm

    assert CLIPViTModel.__init__.__defaults__[:2] == (TENorm, TENorm)


@on_ranks(1)
def test_the_shards_of_a_layer_whose_metadata_names_no_group_are_those_of_all_replicas() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mcore_lab.backends.transformer_engine import TELayerNormColumnParallelLinear

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    layer = TELayerNormColumnParallelLinear(
        8,
        16,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
    )
    assert layer.sharded_state_dict(metadata={})["weight"].global_shape == (16, 8)
