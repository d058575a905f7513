"""What only Transformer Engine's kernels can do, and is refused without them."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.errors import BackendError

_OFF = {
    "fp8": None,
    "fp4": None,
    "quant_recipe": None,
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "delay_wgrad_compute": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "gradient_accumulation_fusion": False,
    "tp_comm_overlap": False,
    "symmetric_ar_type": None,
    "use_transformer_engine_op_fuser": False,
    "fused_residual_rmsnorm": False,
    "moe_single_grouped_weight": False,
    "moe_single_grouped_bias": False,
}
"""Fields of the configuration, of which a Megatron-Core has most, and what leaves them out."""


def check_supported(config: TransformerConfig) -> None:
    """Raise BackendError with every setting that needs Transformer Engine itself."""
    wanted = {
        name: value
        for name, off in _OFF.items()
        if (value := getattr(config, name, off)) != off and value
    }
    if wanted:
        off = {name: _OFF[name] for name in wanted}
        raise BackendError(
            f"{_settings(wanted)} needs Transformer Engine, which is not installed; the layers of "
            f"its names are pure PyTorch here: {_settings(off)}"
        )


def _settings(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


class TEFusedMLP(MLP):
    """Refused: an MLP of Transformer Engine's fused operations, under parameter names of its own.

    Raises BackendError when it is built.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise BackendError(
            f"{type(self).__name__} needs Transformer Engine, which is not installed: "
            "use_te_op_fuser=False, for an MLP of its linear layers"
        )


class TEFusedMLPWithGroupedLinear(TEFusedMLP):
    """Refused as `TEFusedMLP` is."""
