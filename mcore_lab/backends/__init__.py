"""Which modules a layer is built of: pure PyTorch (`torch`) or Transformer Engine (`te`)."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcore_lab.errors import BackendError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Backend", "choose_backend", "decoder_block_spec", "mtp_block_spec"]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend and why it was chosen."""

    name: str
    """`torch` or `te`."""
    reason: str
    """Why, for a person."""


def choose_backend(wanted: str, device_type: str) -> Backend:
    """Choose what layers are built of: `auto` takes Transformer Engine on GPUs that have it.

    Raises BackendError when Transformer Engine is asked for and cannot be used here.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "te" and not installed:
        raise BackendError(
            "backend te needs Transformer Engine, which is not installed: "
            'pip install "mcore-lab[te]", or --model.backend torch'
        )
    if wanted == "te" and device_type != "cuda":
        raise BackendError("backend te needs GPUs, and this runs on CPU: --model.backend torch")
    if wanted in ("te", "torch"):
        return Backend(name=wanted, reason="it was asked for")
    if device_type != "cuda":
        return Backend(name="torch", reason="Transformer Engine needs GPUs, and this runs on CPU")
    if not installed:
        return Backend(name="torch", reason="Transformer Engine is not installed")
    return Backend(name="te", reason="there are GPUs and Transformer Engine is installed")


def decoder_block_spec(
    config: TransformerConfig,
    backend: Backend,
    vp_stage: int | None = None,
    *,
    causal: bool = True,
) -> Any:
    """Return Megatron-Core's spec of this pipeline stage's layers, in the backend's modules.

    Its GPT layers are `causal`; else a token attends to all of its sequence.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.enums import AttnMaskType

    with _modules_of(backend):
        spec = get_gpt_decoder_block_spec(
            config, **_layer_arguments(config, backend), vp_stage=vp_stage
        )
    if not causal:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return spec


def mtp_block_spec(config: TransformerConfig, backend: Backend, vp_stage: int | None = None) -> Any:
    """Return the spec of this pipeline stage's multi-token prediction; None where it has none.

    Each of its layers is built as the decoder's last one is, on whichever stage that may be.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    if not config.mtp_num_layers:
        return None
    arguments = _layer_arguments(config, backend)
    with _modules_of(backend):
        last = gpt_layer_specs.get_gpt_decoder_layer_specs(config, **arguments)[-1]
        return gpt_layer_specs.get_gpt_mtp_block_spec(
            config, last, arguments["use_transformer_engine"], vp_stage=vp_stage
        )


def _layer_arguments(config: TransformerConfig, backend: Backend) -> dict[str, Any]:
    return {
        "use_transformer_engine": backend.name == "te",
        "normalization": config.normalization,
        "qk_l2_norm": getattr(config, "qk_l2_norm", False),
    }


def _modules_of(backend: Backend) -> AbstractContextManager[None]:
    from mcore_lab.backends.torch_backend import in_place_of_local

    return nullcontext() if backend.name == "te" else in_place_of_local()
