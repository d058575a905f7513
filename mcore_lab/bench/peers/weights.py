"""Weights of Megatron-Core's model for peers, which split each matrix as it does."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mcore_lab.bench.peers import Weights

_NAMES = {
    r"^embedding\.": "embedding.word_embeddings.",
    r"^positions$": "embedding.position_embeddings.weight",
    r"^positions\.": "embedding.position_embeddings.",
    r"^blocks\.": "decoder.layers.",
    r"\.norm1\.": ".input_layernorm.",
    r"\.attention\.qkv\.": ".self_attention.linear_qkv.",
    r"\.attention\.proj\.": ".self_attention.linear_proj.",
    r"\.norm2\.": ".pre_mlp_layernorm.",
    r"\.mlp\.fc": ".mlp.linear_fc",
    r"^norm\.": "decoder.final_layernorm.",
    r"^head\.": "output_layer.",
}
_FUSED = {
    r"\.self_attention\.linear_qkv\.layer_norm_": ".input_layernorm.",
    r"\.mlp\.linear_fc1\.layer_norm_": ".pre_mlp_layernorm.",
}
"""Transformer Engine has a layer's norm in the layer after it."""


def weights_of(model: nn.Module) -> Weights:
    """Return copies of this rank's parameters, each norm by the name of a layer of its own."""
    return {_renamed(name, _FUSED): one.detach().clone() for name, one in model.named_parameters()}


@torch.no_grad()
def fill(model: nn.Module, weights: Weights) -> None:
    """Give a peer the weights, all of which it must have."""
    left = dict(weights)
    for name, parameter in model.named_parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        part.copy_(left.pop(_renamed(name, _NAMES)))
    assert not left, f"no peer has {', '.join(left)}"


def _renamed(name: str, names: dict[str, str]) -> str:
    for pattern, other in names.items():
        name = re.sub(pattern, other, name)
    return name
