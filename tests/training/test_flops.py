"""The formula of a model's FLOPs, against those that torch counts while the real model trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from small_runs import SMALL, changed
from torch.utils.flop_counter import FlopCounterMode

from mcore_lab.training.flops import not_counted, peak_flops, training_flops

BATCH, LENGTH, VOCABULARY = 3, 16, 128
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False, "moe_router_topk": 2}
LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 10,
    "position_embedding_type": "rope",
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped queries and other heads": {"num_query_groups": 2, "kv_channels": 12},
    "gated MLP": {"gated_linear_unit": True, "activation_func": "silu", "ffn_hidden_size": 40},
    "tied embeddings": {"share_embeddings_and_output_weights": True},
    "experts": EXPERTS | {"moe_ffn_hidden_size": 24},
    "gated experts, a shared one, and dense layers": EXPERTS
    | {
        "gated_linear_unit": True,
        "moe_layer_freq": [0, 1, 1, 0],
        "moe_shared_expert_intermediate_size": 20,
    },
    "a shared expert with a gate of its own": EXPERTS
    | {"moe_shared_expert_intermediate_size": 20, "moe_shared_expert_gate": True},
    "experts in every second layer": EXPERTS | {"moe_layer_freq": 2},
    "latent attention": LATENT | {"q_lora_rank": 16},
    "latent attention without compressed queries": LATENT | {"q_lora_rank": None},
    "multi-token prediction": {"mtp_num_layers": 2, "position_embedding_type": "rope"},
}
_OF_THE_MODEL = vars(SMALL.model).keys()


@on_ranks(1, timeout=120)
def test_the_formula_is_what_torch_counts_in_a_forward_and_a_backward_pass() -> None:
    from megatron.core import parallel_state, tensor_parallel

    from mcore_lab.backends import choose_backend
    from mcore_lab.model import gpt_chunk, pipeline_stages, transformer_config
    from mcore_lab.runtime import process_group

    with process_group():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        for name, fields in MODELS.items():
            model = {key: value for key, value in fields.items() if key in _OF_THE_MODEL}
            others = {key: value for key, value in fields.items() if key not in model}
            transformer = SMALL.model.transformer | others
            recipe = changed(SMALL, model=model | {"transformer": transformer})
            config = transformer_config(recipe)
            (stage,) = pipeline_stages(recipe.layout)
            chunk = gpt_chunk(recipe, config, stage, choose_backend("torch", "cpu"), VOCABULARY)
            tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
            positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
            with FlopCounterMode(display=False) as counter:
                chunk(tokens, positions, None, labels=tokens).sum().backward()

            def of_formula(causal: bool, config: Any = config) -> float:
                return BATCH * training_flops(
                    config, sequence_length=LENGTH, vocab_size=VOCABULARY, causal=causal
                )

            # The products between all tokens are computed, and half of them masked.
            assert of_formula(causal=False) == counter.get_total_flops(), name
            assert not not_counted(config)
            counted = counter.get_flop_counts()["Global"]
            batched = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
            of_attention = sum(counted.get(product, 0) for product in batched)
            assert of_formula(causal=True) == counter.get_total_flops() - of_attention / 2, name


def test_palms_formula_is_this_one_where_the_models_are_alike() -> None:
    """6 N + 12 L H Q T operations a token, with N the weights that a token is multiplied by."""
    layers, heads, channels, length, vocabulary = 118, 48, 256, 2048, 256_000
    hidden = 18_432
    config = SimpleNamespace(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=channels,
        num_query_groups=1,
        ffn_hidden_size=4 * hidden,
        gated_linear_unit=True,
        multi_latent_attention=False,
        num_moe_experts=None,
        mtp_num_layers=None,
    )
    attention = hidden * channels * (2 * heads + 2)
    weights = layers * (attention + 3 * hidden * 4 * hidden) + hidden * vocabulary
    # PaLM has 540 x 10^9 parameters, in its paper's table 1.
    assert weights == pytest.approx(540e9, rel=0.01)
    a_token = 6 * weights + 12 * layers * heads * channels * length
    found = training_flops(config, sequence_length=length, vocab_size=vocabulary, causal=False)
    assert found / length == pytest.approx(a_token, rel=1e-12)


def test_a_model_that_is_computed_otherwise_is_named() -> None:
    assert not_counted(SimpleNamespace(window_size=(8, 0), moe_latent_size=None)) == ["window_size"]


@pytest.mark.parametrize(
    ("gpu", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H100 NVL", "fp32", None),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H800", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA H200 MIG 1g.18gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_the_peak_is_of_gpus_that_are_known_by_name(
    gpu: str, precision: str, teraflops: float | None
) -> None:
    assert peak_flops(gpu, precision) == (None if teraflops is None else teraflops * 1e12)
