"""Transformer Engine's names in Megatron-Core, where it is not installed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

_TRANSFORMER_ENGINE = "megatron.core.extensions.transformer_engine"
_SPECS = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.models.bert.bert_layer_specs",
    "megatron.core.models.T5.t5_spec",
    "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs",
)
_VISION = "megatron.core.models.vision.clip_vit_model"


def name_stand_ins() -> None:
    """Give Megatron-Core this project's layers by the names of Transformer Engine's.

    Without it these are mocks or None, and specs that name them cannot be built. `HAVE_TE` stays
    False, by which Megatron-Core knows of kernels to call, but where it is asked for these names
    only.
    """
    if importlib.import_module(_TRANSFORMER_ENGINE).HAVE_TE:
        return
    from mcore_lab.backends.transformer_engine import STAND_INS

    provider: Any = importlib.import_module(f"{_TRANSFORMER_ENGINE}_spec_provider")
    # It asks for versions that have what the stand-ins have.
    provider.is_te_min_version = lambda *version: True
    names = STAND_INS | {"TESpecProvider": provider.TESpecProvider}
    for name in _SPECS:
        vars(importlib.import_module(name)).update(names)
    # It refuses by this to build a spec, and asks for nothing else by it.
    bert: Any = importlib.import_module("megatron.core.models.bert.bert_layer_specs")
    bert.HAVE_TE = True
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("megatron."):
            known = vars(module)
            known.update((name, names[name]) for name in names.keys() & known.keys())
    block: Any = importlib.import_module("megatron.core.transformer.transformer_block")
    block.LayerNormImpl = STAND_INS["TENorm"]
    moe_layer: Any = importlib.import_module("megatron.core.transformer.moe.moe_layer")
    moe_layer.HAVE_TE, moe_layer.TELinear = True, STAND_INS["TELinear"]
    _norm_vision_models()


def _norm_vision_models() -> None:
    """They fall back on torch's LayerNorm, which does not take the arguments they give it."""
    from mcore_lab.backends.transformer_engine import TENorm

    vision: Any = importlib.import_module(_VISION)
    vision.NORM_IMPL = TENorm
    init = vision.CLIPViTModel.__init__
    init.__defaults__ = tuple(
        TENorm if default is torch.nn.LayerNorm else default for default in init.__defaults__
    )
