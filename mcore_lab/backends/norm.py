"""LayerNorm and RMSNorm in pure PyTorch that work under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm:
    """Build the norm that the configuration names: a torch.nn.LayerNorm or torch.nn.RMSNorm.

    Takes and returns `[s, b, h]` (under sequence parallelism `[s / tp, b, h]`). Each rank then sees
    a part of the sequence, so the gradients of the norm's parameters are partial sums; parameters
    marked `sequence_parallel` are summed over tensor-parallel ranks by `finalize_model_grads`.
    That mark is what Megatron-Core's own `WrappedTorchNorm` lacks, and why it refuses.
    """

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        **unused: object,
    ) -> torch.nn.Module:
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        kind = kinds.get(config.normalization)
        if kind is None:
            raise ValueError(
                f"the torch backend has {' and '.join(kinds)}, no {config.normalization}"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError("the torch backend has no layernorm_zero_centered_gamma")
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
