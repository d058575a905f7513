"""Which modules a layer is built of: pure PyTorch (`torch`) or Transformer Engine (`te`)."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcore_lab.errors import BackendError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Backend", "choose_backend", "decoder_block_spec"]


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
    config: TransformerConfig, backend: Backend, vp_stage: int | None = None
) -> Any:
    """Return Megatron-Core's spec of this pipeline stage's layers, in the backend's modules."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from mcore_lab.backends.torch_backend import in_place_of_local

    with nullcontext() if backend.name == "te" else in_place_of_local():
        return get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=backend.name == "te",
            normalization=config.normalization,
            qk_l2_norm=getattr(config, "qk_l2_norm", False),
            vp_stage=vp_stage,
        )
