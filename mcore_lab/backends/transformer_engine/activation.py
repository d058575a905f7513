"""The activation functions that Megatron-Core takes from Transformer Engine."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.backends.transformer_engine.norm import allow_no_extra_state
from mcore_lab.errors import BackendError


class TEActivationOp(torch.nn.Module):
    """SwiGLU, GEGLU or GELU, as the configuration has it; GELU is the tanh approximation.

    Takes `[…, n]`; the gated ones return `[…, n / 2]`, the second half times the activated first.
    Raises BackendError for another activation function.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.gated_linear_unit
        if config.activation_func is F.gelu:
            self.function = partial(F.gelu, approximate="tanh")
        elif config.activation_func is F.silu and self.gated:
            self.function = F.silu
        else:
            raise BackendError(
                "use_te_activation_func=True has SwiGLU, GEGLU and GELU: activation_func=F.gelu, "
                "or F.silu with gated_linear_unit=True, or use_te_activation_func=False"
            )
        self._register_load_state_dict_pre_hook(allow_no_extra_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        if not self.gated:
            return self.function(x)
        activated, factor = x.chunk(2, dim=-1)
        return self.function(activated) * factor

    def get_extra_state(self) -> None:
        """Hold the place of the state that Transformer Engine's modules have under fp8."""

    def set_extra_state(self, state: object) -> None:
        """There is none."""
