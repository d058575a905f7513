"""One linear layer of several experts at once, as one grouped matrix product in pure PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide

_ALIGNMENT = 16
"""Bytes that torch's grouped product wants each row to be a multiple of."""


def grouped_product(
    tokens: torch.Tensor, weight: torch.Tensor, tokens_per_expert: list[int]
) -> torch.Tensor:
    """Multiply each expert's tokens by its weight: `[t, k]` and `[e, n, k]` to `[t, n]`.

    Tokens come in the order of their experts; an expert may have none. torch's own grouped product
    does the arithmetic of the tokens that there are. Where it does not take the device, the type or
    the sizes, experts are padded to the tokens of the busiest one and multiplied as a batch.
    """
    counts = torch.tensor(tokens_per_expert, device=tokens.device)
    if _sizes_are_aligned(weight) and _has_grouped_product(tokens.device.type, tokens.dtype):
        ends = counts.cumsum(0, dtype=torch.int32)
        product: torch.Tensor = _GroupedProduct.apply(tokens.contiguous(), weight, ends)
        return product
    return _padded_product(tokens, weight, counts, most=max(tokens_per_expert))


class _GroupedProduct(torch.autograd.Function):
    """torch's grouped product, for gradients of any strides: its own wants them contiguous."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, weight, ends)
        return torch._grouped_mm(tokens, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_tokens, of_weight, _ = ctx.needs_input_grad
        return (
            torch._grouped_mm(grad, weight, offs=ends) if of_tokens else None,
            torch._grouped_mm(grad.t(), tokens, offs=ends) if of_weight else None,
            None,
        )


def _padded_product(
    tokens: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, most: int
) -> torch.Tensor:
    number, experts = tokens.shape[0], weight.shape[0]
    # Expert i has rows i * most and on; before its first are the tokens of the experts before it.
    shift = torch.arange(experts, device=tokens.device) * most - (counts.cumsum(0) - counts)
    rows = torch.arange(number, device=tokens.device)
    rows += shift.repeat_interleave(counts, output_size=number)
    padded = tokens.new_zeros(experts * most, tokens.shape[1]).index_copy(0, rows, tokens)
    product = torch.bmm(padded.unflatten(0, (experts, most)), weight.transpose(1, 2))
    return product.flatten(0, 1).index_select(0, rows)


def _sizes_are_aligned(weight: torch.Tensor) -> bool:
    return all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])


@functools.cache
def _has_grouped_product(device_type: str, dtype: torch.dtype) -> bool:
    """Try it: which devices and types torch's grouped product takes changes with its version."""
    tokens = torch.zeros(1, 8, dtype=dtype, device=device_type)
    weight = torch.zeros(1, 8, 8, dtype=dtype, device=device_type)
    ends = torch.ones(1, dtype=torch.int32, device=device_type)
    try:
        torch._grouped_mm(tokens, weight, offs=ends)
        torch._grouped_mm(tokens.t(), tokens, offs=ends)
    except (AttributeError, RuntimeError):
        return False
    return True


class GroupedLinear(torch.nn.Module):
    """A linear layer of each local expert: weight `[e, out, in]`, bias `[e, out]` or None.

    Stands where Transformer Engine's `GroupedLinear` does in Megatron-Core's `TEGroupedMLP`. Expert
    tensor parallelism splits each expert's outputs (`partition_dim` 0) or inputs (1); with `stride`
    2 the outputs are those of two matrices, a gated unit's, and each is split for itself.
    """

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        pg_collection: ProcessGroupCollection,
        partition_dim: int,
        stride: int = 1,
        **unused: object,
    ) -> None:
        super().__init__()
        self.skip_bias_add, self.partition_dim, self.stride = skip_bias_add, partition_dim, stride
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        whole = [output_size, input_size]
        part = list(whole)
        part[partition_dim] = divide(part[partition_dim], self.tp_group.size())
        on_cpu = config.use_cpu_initialization
        device = "cpu" if on_cpu else torch.cuda.current_device()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(num_experts, *part, **options))
        set_tensor_model_parallel_attributes(self.weight, True, partition_dim + 1, stride)
        zeros = torch.zeros(num_experts, part[0], **options) if bias else None
        self.bias = None if zeros is None else torch.nn.Parameter(zeros)
        if config.perform_initialization:
            draw = self._draw_on_cpu if on_cpu else self._draw_on_device
            with torch.no_grad():
                draw(init_method, whole)

    def _draw_on_cpu(self, init_method: Callable[[torch.Tensor], Any], whole: list[int]) -> None:
        """Draw every expert of the layer whole and keep this rank's: the same on any layout."""
        experts, ranks = len(self.weight), self.tp_group.size()
        first = self.ep_group.rank() * experts
        piece = whole[self.partition_dim] // ranks // self.stride
        for expert in range(self.ep_group.size() * experts):
            master = torch.empty(whole)
            init_method(master)
            if first <= expert < first + experts:
                pieces = master.split(piece, self.partition_dim)[self.tp_group.rank() :: ranks]
                self.weight[expert - first] = torch.cat(pieces, self.partition_dim)

    def _draw_on_device(self, init_method: Callable[[torch.Tensor], Any], _: list[int]) -> None:
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for weight in self.weight:
                init_method(weight)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `[t, out]`, and the bias that is left to add where it is skipped."""
        output = grouped_product(tokens, self.weight, tokens_per_expert)
        if self.bias is None or self.skip_bias_add:
            return output, self.bias
        return output + per_token(self.bias, tokens_per_expert), None

    def backward_dw(self) -> None:
        """Weight gradients are computed in the backward pass; none is delayed."""

    def get_extra_state(self) -> None:
        """Hold the place of the state that Transformer Engine's layers have under fp8."""

    def set_extra_state(self, state: object) -> None:
        """There is none."""


def per_token(values: torch.Tensor, tokens_per_expert: list[int]) -> torch.Tensor:
    """Repeat each expert's row for each of its tokens: `[e, n]` to `[t, n]`."""
    counts = torch.tensor(tokens_per_expert, device=values.device)
    return values.repeat_interleave(counts, dim=0, output_size=sum(tokens_per_expert))
