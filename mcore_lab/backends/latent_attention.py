"""Multi-latent attention whose gradients are whole under tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class TorchMLASelfAttention(MLASelfAttention):
    """Megatron-Core's `MLASelfAttention`, right on column-parallel layers too.

    Keys have rotary channels that all heads share. Megatron-Core splits their gradient over
    tensor-parallel ranks without a sum, so that each rank's part has its own heads' share only
    (Megatron-LM #1699, to 0.19). And without sequence parallelism it sums the gradients of the
    queries' norm, of which every rank has the whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pg_collection.tp.size() == 1:
            return
        self.linear_kv_down_proj.register_forward_hook(self._gather_latents)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True

    def _gather_latents(
        self, linear: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Return the latents and rotary keys whole: `[s, b, (l + r) / tp]` to `[s, b, l + r]`.

        Under sequence parallelism `[s / tp, b, l + r]`: what Megatron-Core takes from a layer that
        every rank has whole, and whose gradient it gathers and sums.
        """
        group = self.pg_collection.tp
        whole = gather_from_tensor_model_parallel_region(output[0], group=group)
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(whole, group=group), output[1]
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        latents, rotary = whole.split(sizes, dim=-1)
        return torch.cat([latents, _OfAllHeads.apply(rotary, group)], dim=-1), output[1]


class _OfAllHeads(torch.autograd.Function):
    """Hand on what all heads share; its gradient is the sum of those of each rank's heads."""

    @staticmethod
    def forward(ctx: Any, shared: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Megatron-Core's own, to 0.18, leaves a gradient that is not contiguous as it is.
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
