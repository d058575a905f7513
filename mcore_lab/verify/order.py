"""The order in which a GPT uses its weights, by their names. No torch in here."""

from __future__ import annotations

import re

_PARTS = ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")
_INSIDE = (
    "layer_norm",
    "router",
    "linear_q",
    "linear_kv",
    "q_layernorm",
    "k_layernorm",
    "core_attention",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)")

Place = tuple[int, int, int, int, str]


def forward_place(name: str) -> Place:
    """Return what sorts names of weights in the order in which a forward pass uses them."""
    if name.startswith("embedding"):
        return (0, 0, 0, 0, name)
    layer = _LAYER.search(name)
    if layer:
        stage = 4 if name.startswith("mtp") else 1
        rest = layer[2]
        return (stage, int(layer[1]), _part(rest), _inside(rest), name)
    return (3 if name.startswith("output_layer") else 2, 0, 0, 0, name)


def _part(rest: str) -> int:
    return next((n for n, part in enumerate(_PARTS) if rest.startswith(part)), len(_PARTS))


def _inside(rest: str) -> int:
    places = [n for n, part in enumerate(_INSIDE) if part in rest]
    return min(places, default=len(_INSIDE))
