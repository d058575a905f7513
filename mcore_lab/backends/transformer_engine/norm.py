"""LayerNorm and RMSNorm as Transformer Engine has them: apart, and for the layers they are in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter

from mcore_lab.backends.transformer_engine.refusals import check_supported


def norm_parameters(
    config: TransformerConfig, hidden_size: int
) -> tuple[Parameter, Parameter | None]:
    """Return a norm's weight and its bias, each `[h]`; an RMSNorm has no bias.

    Under sequence parallelism their gradients are partial sums, and they are marked so.
    Raises ValueError for a norm that Transformer Engine does not have.
    """
    if config.normalization not in ("LayerNorm", "RMSNorm"):
        raise ValueError(f"Transformer Engine has LayerNorm and RMSNorm, no {config.normalization}")
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    zeros = torch.zeros(hidden_size, dtype=config.params_dtype, device=device)
    weight = Parameter(zeros.clone() if config.layernorm_zero_centered_gamma else zeros + 1)
    bias = Parameter(zeros) if config.normalization == "LayerNorm" else None
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight, bias


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: TransformerConfig,
    eps: float,
) -> torch.Tensor:
    """Return `[…, h]` normalized over h, by the norm that the configuration names."""
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class TENorm(torch.nn.Module):
    """The norm that the configuration names: takes and returns `[s, b, h]`."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        has_residual: bool = False,
    ) -> None:
        check_supported(config)
        super().__init__()
        self.config, self.eps = config, eps
        self.bias: Parameter | None
        self.weight, self.bias = norm_parameters(config, hidden_size)
        self._register_load_state_dict_pre_hook(allow_no_extra_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        return normalize(x, self.weight, self.bias, self.config, self.eps)

    def get_extra_state(self) -> None:
        """Hold the place of the state that Transformer Engine's modules have under fp8."""

    def set_extra_state(self, state: object) -> None:
        """There is none."""


def allow_no_extra_state(state: dict[str, object], prefix: str, *_: object) -> None:
    """Load what was saved by a module that has no extra state, as a `torch.nn` norm."""
    state.setdefault(f"{prefix}_extra_state", None)
