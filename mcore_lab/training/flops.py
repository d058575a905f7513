"""The floating-point operations that a model's training takes, and what of a GPU's peak they are.

Counted are the products of matrices, two operations (a multiplication and an addition) for each
pair of elements, three times: in the forward pass, for the gradients of activations, and for those
of weights. Of one sequence of s tokens, with width h, n heads of d channels, g of them for keys and
values, the forward pass takes

    a layer's attention     2 s h d (2 n + 2 g)  and, between tokens, 4 p n d
    a layer's MLP           4 s h f, with a gate 6 s h f
    a layer's experts       the same with f of an expert for each of the k it is routed to and of
                            the shared one, and 2 s h e for the router of e experts
    the output layer        2 s h v

where p is the pairs of tokens that attend to each other: s^2, with a causal mask s^2 / 2. Latent
attention counts its own matrices; a layer of multi-token prediction is a layer, 4 s h^2 that join
embedding and state, and logits of its own.

Sources: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), appendix B, for the model FLOPs utilization
(MFU), which leaves out what recomputation repeats, and counts s^2 for causal attention too;
Megatron-LM's `num_floating_point_operations` (megatron/training/training.py, core_v0.16.1 and
core_v0.19) for the terms, among them s^2 / 2. It leaves out the router and counts the norms of
latent attention and of multi-token prediction, the other way round than here; all else is equal.

Not in it: embeddings, norms, activations, the softmax, the loss, the optimizer. Documents that are
packed count as one sequence, and an expert that drops tokens as if it did not.

    TFLOP/s of a rank       operations of a step / (its seconds x ranks x 10^12)
    MFU                     TFLOP/s of a rank / peak TFLOP/s of its device

A step's seconds are those from its first micro-batch to its optimizer's end; validations and
checkpoints come between steps. The peak is dense, and of the recipe's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mcore_lab.config import Recipe

FORWARD_AND_BACKWARD = 3
"""The backward pass takes two products for each of the forward pass."""

_NOT_COUNTED = (
    "attention_output_gate",
    "experimental_attention_variant",
    "heterogeneous_block_specs",
    "linear_attention_type",
    "moe_latent_size",
    "mtp_use_repeated_layer",
    "window_size",
)
"""Fields of `TransformerConfig`, of one version or another, that change what is computed."""


def not_counted(config: Any) -> list[str]:
    """Return the fields of a `TransformerConfig` that make a model of which no formula is here."""
    return [name for name in _NOT_COUNTED if getattr(config, name, None)]


def training_flops(
    config: Any, *, sequence_length: int, vocab_size: int, causal: bool = True
) -> float:
    """Return the operations that training on one sequence takes: forward and backward.

    `config` is a `TransformerConfig` of which nothing is `not_counted`; `vocab_size` is the rows of
    the output layer.
    """
    tokens, pairs = sequence_length, sequence_length**2 / (2 if causal else 1)
    frequency = _expert_layers(config)
    # Each layer of multi-token prediction is built as the decoder's last one is.
    predicting = config.mtp_num_layers or 0
    with_experts = [*frequency, *frequency[-1:] * predicting]
    of_layers = sum(
        tokens * _attention_weights(config)
        + pairs * _attention_channels(config)
        + tokens * (_expert_weights(config) if experts else _mlp_weights(config))
        for experts in with_experts
    )
    hidden = config.hidden_size
    # Multi-token prediction joins embedding and state of a token, `[2 h]`, and has its own logits.
    of_predictions = predicting * tokens * 2 * hidden * hidden
    of_output = (1 + predicting) * tokens * hidden * vocab_size
    return 2 * FORWARD_AND_BACKWARD * (of_layers + of_predictions + of_output)


def _attention_weights(config: Any) -> int:
    """Return how many weights a token is multiplied by in a layer's attention."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if not config.multi_latent_attention:
        channels = config.kv_channels
        return int(hidden * channels * (2 * heads + 2 * config.num_query_groups))
    queries = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
    rank = config.q_lora_rank
    of_queries = rank * (hidden + queries) if rank else hidden * queries
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    return int(of_queries + down + up + heads * config.v_head_dim * hidden)


def _attention_channels(config: Any) -> int:
    """Return the channels of all heads in which a pair of tokens meets: of keys and of values."""
    heads = config.num_attention_heads
    if not config.multi_latent_attention:
        return int(2 * heads * config.kv_channels)
    return int(heads * (config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim))


def _mlp_weights(config: Any, width: int | None = None) -> int:
    matrices = 3 if config.gated_linear_unit else 2
    return int(matrices * config.hidden_size * (width or config.ffn_hidden_size))


def _expert_weights(config: Any) -> int:
    shared = config.moe_shared_expert_intermediate_size
    routed = config.moe_router_topk * _mlp_weights(config, config.moe_ffn_hidden_size)
    of_shared = _mlp_weights(config, shared) if shared else 0
    if shared and getattr(config, "moe_shared_expert_gate", False):
        of_shared += config.hidden_size
    return int(routed + of_shared + config.hidden_size * config.num_moe_experts)


def _expert_layers(config: Any) -> list[bool]:
    """Say of each layer of the decoder whether it has experts."""
    if not config.num_moe_experts:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(experts) for experts in frequency]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a GPU can do at most, in dense TFLOP/s (10^12 operations a second)."""

    bf16: float
    """Of its tensor cores, in bfloat16 with fp32 sums."""
    fp32: float | None = None
    """Without them: torch multiplies fp32 matrices so, if it is not told otherwise."""


PEAKS = {
    "A100": Peak(bf16=312, fp32=19.5),
    "A800": Peak(bf16=312, fp32=19.5),
    "H100 PCIe": Peak(bf16=756, fp32=51),
    "H100 NVL": Peak(bf16=835),
    "H100": Peak(bf16=989, fp32=67),
    "H200 NVL": Peak(bf16=836),
    "H200": Peak(bf16=989, fp32=67),
    "L40S": Peak(bf16=362, fp32=91.6),
    "L4": Peak(bf16=121, fp32=30.3),
}
"""NVIDIA's data sheets, by words of the name that CUDA gives. They state bf16 with sparsity: twice.

Held against `get_peak_flops` of torchtitan (A100, H100, H200) and of nanochat (the others), and
fp32 against copies of the data sheets at resellers. What these tell otherwise of is left out, as
H800 is, and what none tells of.
"""


def peak_flops(gpu: str, precision: str) -> float | None:
    """Return the operations a second of a GPU by its name; None if they are not in the table.

    `precision` is bf16 or fp32. A slice of a GPU (MIG) has a part of its peak, which is not known.
    """
    words = gpu.upper().replace("-", " ").split()
    if "MIG" in words:
        return None
    for name in sorted(PEAKS, key=len, reverse=True):
        if all(part in words for part in name.upper().split()):
            teraflops: float | None = getattr(PEAKS[name], precision)
            return None if teraflops is None else 1e12 * teraflops
    return None


def step_flops(recipe: Recipe, config: Any, vocab_size: int) -> float | None:
    """Return the operations of a step on all ranks together; None if there is no formula for them.

    `vocab_size` is the rows of the output layer.
    """
    if not_counted(config):
        return None
    data = recipe.data
    return data.global_batch_size * training_flops(
        config,
        sequence_length=data.sequence_length,
        vocab_size=vocab_size,
        causal=recipe.model.causal_attention,
    )


def device_peak_flops(recipe: Recipe, device_type: str) -> float | None:
    """Return the operations a second that a rank's device can do at most; None if not known.

    What the recipe says, else what is known of this rank's GPU in the recipe's precision.
    """
    training, transformer = recipe.training, recipe.model.transformer
    if training.peak_tflops is not None:
        return training.peak_tflops * 1e12
    others = transformer.get("fp8") or transformer.get("fp4")
    in_tf32 = training.precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    if device_type != "cuda" or others or in_tf32:
        return None
    return peak_flops(torch.cuda.get_device_name(), training.precision)
