"""A small GPT of Megatron-Core's Transformer Engine specs, or of the torch backend's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mcore_lab.layout import ParallelLayout
from mcore_lab.runtime.parallel import model_parallel

VOCABULARY = 64

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}

SWIGLU = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
RMS = {"normalization": "RMSNorm", "qk_layernorm": True, "num_query_groups": 2, **SWIGLU}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_layer_freq": [0, 1],
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    **SWIGLU,
}
GROUPED = {"moe_grouped_gemm": True}
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
PREDICTING = {"mtp_num_layers": 1}
MODELS = {
    "dense": {},
    "rms": RMS,
    "experts": EXPERTS,
    "grouped": EXPERTS | GROUPED,
    "latent": LATENT,
    "predicting": PREDICTING,
}
"""Fields of the configuration of each model."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What ranks found together: the loss, and gradients as one rank would have them."""

    loss: float
    grads: dict[str, torch.Tensor]
    split: dict[str, int]
    """The dimension along which tensor-parallel ranks split a parameter, for those that are."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which GPT, of which spec, on which ranks."""

    kind: str = "dense"
    transformer_engine: bool = True
    sizes: dict[str, Any] = field(default_factory=dict)
    """Of the layout."""

    @contextmanager
    def ranks(self) -> Iterator[torch.nn.Module]:
        """Build it in this rank, among those that a launch has started."""
        with model_parallel(ParallelLayout(**self.sizes), device="cpu"):
            yield self.build()

    def build(self, seed: int = 11) -> Any:
        """Return the GPT with weights that depend on the seed only, not on the layout."""
        from megatron.core.models.gpt import GPTModel

        torch.manual_seed(seed)
        config = self.config()
        decoder, mtp = self._specs(config)
        return GPTModel(
            config,
            decoder,
            vocab_size=VOCABULARY,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            mtp_block_spec=mtp,
        )

    def config(self) -> Any:
        from megatron.core.transformer.transformer_config import (
            MLATransformerConfig,
            TransformerConfig,
        )

        fields = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            # Weights that are large enough for the loss to tell of each.
            "init_method_std": 0.2,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
        }
        of_kind = MODELS[self.kind]
        latent = of_kind.get("multi_latent_attention", False)
        return (MLATransformerConfig if latent else TransformerConfig)(
            **fields | of_kind | self.sizes
        )

    def _specs(self, config: Any) -> tuple[Any, Any]:
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_decoder_block_spec,
            get_gpt_mtp_block_spec,
        )

        from mcore_lab.backends import Backend, decoder_block_spec, mtp_block_spec

        if self.transformer_engine:
            decoder = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
            mtp = config.mtp_num_layers and get_gpt_mtp_block_spec(
                config, decoder, use_transformer_engine=True
            )
            return decoder, mtp or None
        backend = Backend(name="torch", reason="it is compared with")
        return decoder_block_spec(config, backend), mtp_block_spec(config, backend)


def loss_and_gradients(model: Model) -> Outcome:
    """Take one step of the model's GPT in this rank."""
    with model.ranks() as gpt:
        return step(gpt)


def step(gpt: Any) -> Outcome:
    """Return the loss of two samples, and the gradients summed where ranks have partial ones."""
    from megatron.core import parallel_state

    loss = _loss(gpt, parallel_state.get_context_parallel_group())
    tp = parallel_state.get_tensor_model_parallel_group()
    grads, split = {}, {}
    for name, parameter in gpt.named_parameters():
        grads[name] = parameter.grad.clone()
        dist.all_reduce(grads[name], group=parallel_state.get_context_parallel_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grads[name], group=tp)
        elif getattr(parameter, "tensor_model_parallel", False):
            split[name] = parameter.partition_dim
    return Outcome(loss=loss, grads=grads, split=split)


def _loss(gpt: Any, cp: dist.ProcessGroup) -> float:
    """Sum the loss of each token; each context-parallel rank has its zigzag chunks of them."""
    from mcore_lab.backends.context_parallel import zigzag_places

    text = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    places = zigzag_places([16], cp.rank(), cp.size())
    positions = torch.arange(16).expand(2, -1)[:, places]
    losses = gpt(text[:, :-1][:, places], positions, None, labels=text[:, 1:][:, places])
    losses.sum().backward()
    total = losses.detach().double().sum()
    dist.all_reduce(total, group=cp)
    return float(total)


def sequential_name(name: str, first: int = 0) -> str:
    """Return the name in sequential experts of one in grouped experts, which are `first` and on."""
    head, dot, number = name.rpartition(".weight")
    if not number.isdigit():
        return name
    experts, _, linear = head.rpartition(".")
    return f"{experts}.local_experts.{first + int(number)}.{linear}{dot}"
