"""A small GPT of Megatron-Core whose loss and gradients are gathered from every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from cp_cases import Case, context_parallel_ranks
from cp_module import packed_params

from mcore_lab.backends import Backend, decoder_block_spec
from mcore_lab.backends.context_parallel import zigzag_places

VOCABULARY = 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which GPT, over which ranks."""

    tp: int = 1
    cp: int = 1
    hierarchy: list[int] | None = None
    position_embedding_type: str = "rope"
    documents: tuple[int, ...] | None = None
    """Lengths of the documents of a packed sequence; two samples of one document if not set."""
    packed: bool = True
    """Whether the documents are packed; else they go through the model one by one, on one rank."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the configuration."""

    @property
    def cut(self) -> Sequence[int]:
        """Lengths of what is cut into chunks."""
        return self.documents or [32]


@dataclass(frozen=True)
class Outcome:
    """What a rank found, summed over the ranks that share its sequence."""

    loss: float
    grads: dict[str, torch.Tensor]
    split: dict[str, int]
    """The dimension along which tensor-parallel ranks split a parameter, for those that are."""


def loss_and_gradients(model: Model) -> Outcome:
    """Take one step of a GPT on this rank's part of a batch."""
    with context_parallel_ranks(model.cp, tp=model.tp, hierarchy=model.hierarchy):
        from megatron.core import parallel_state

        torch.manual_seed(11)
        gpt = _build(model)
        group = parallel_state.get_context_parallel_group()
        total = torch.zeros((), dtype=torch.float64)
        for batch in _batches(model, group.rank()):
            losses = gpt(attention_mask=None, **batch)
            losses.float().sum().backward()
            total += losses.detach().double().sum()
        dist.all_reduce(total, group=group)
        grads = {}
        for name, parameter in gpt.named_parameters():
            grads[name] = parameter.grad.clone()
            dist.all_reduce(grads[name], group=group)
        split = {
            name: parameter.partition_dim
            for name, parameter in gpt.named_parameters()
            if getattr(parameter, "tensor_model_parallel", False)
        }
    return Outcome(total.item(), grads, split)


def _build(model: Model) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    multi_latent = model.fields.get("multi_latent_attention", False)
    config = (MLATransformerConfig if multi_latent else TransformerConfig)(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 8,
            "num_query_groups": 8 if multi_latent else 4,
            "tensor_model_parallel_size": model.tp,
            "context_parallel_size": model.cp,
            "hierarchical_context_parallel_sizes": model.hierarchy,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "calculate_per_token_loss": True,
        }
        | model.fields
    )
    backend = Backend(name="torch", reason="it is tested")
    return GPTModel(
        config,
        decoder_block_spec(config, backend),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type=model.position_embedding_type,
        share_embeddings_and_output_weights=True,
    )


def _batches(model: Model, rank: int) -> list[dict[str, Any]]:
    """Return this rank's chunks of the samples, with the positions that they have in all of it."""
    samples = 1 if model.documents else 2
    draw = torch.Generator().manual_seed(3)
    text = torch.randint(0, VOCABULARY, (samples, sum(model.cut) + 1), generator=draw)
    positions = torch.cat([torch.arange(length) for length in model.cut])
    places = zigzag_places(model.cut, rank, model.cp)
    batch: dict[str, Any] = {
        "input_ids": text[:, :-1][:, places],
        "labels": text[:, 1:][:, places],
        "position_ids": positions.expand(samples, -1)[:, places],
    }
    if model.documents and model.packed:
        batch["packed_seq_params"] = packed_params(Case(stored=model.documents))
    if model.packed:
        return [batch]
    split = {name: tensor.split(model.cut, dim=1) for name, tensor in batch.items()}
    return [dict(zip(split, one, strict=True)) for one in zip(*split.values(), strict=True)]
