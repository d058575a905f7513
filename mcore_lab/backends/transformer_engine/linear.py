"""Transformer Engine's linear layers, on those of Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from mcore_lab.backends.experts import Offset, reduce_as_experts
from mcore_lab.backends.transformer_engine.norm import (
    allow_no_extra_state,
    norm_parameters,
    normalize,
)
from mcore_lab.backends.transformer_engine.refusals import check_supported
from mcore_lab.backends.transformer_engine.unseeded import draws_unseeded


class TELinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank has whole: `[s, b, k]` to `[s, b, n]`.

    Transformer Engine's takes other values of `parallel_mode` than `duplicated`, for the layers
    that Megatron-Core derives from it; here these are layers of their own.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool = False,
        **unused: object,
    ) -> None:
        check_supported(config)
        if parallel_mode != "duplicated":
            raise ValueError(
                f"TELinear without Transformer Engine has parallel_mode='duplicated', no "
                f"{parallel_mode!r}: TEColumnParallelLinear or TERowParallelLinear"
            )
        _refuse(skip_weight_param_allocation=skip_weight_param_allocation)
        super().__init__()
        self.skip_bias_add, self.parallel_mode = skip_bias_add, None
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, **options))
        zeros = torch.zeros(output_size, **options) if bias else None
        self.bias = None if zeros is None else torch.nn.Parameter(zeros)
        if config.perform_initialization:
            self._draw(init_method, on_cpu=config.use_cpu_initialization)
        for parameter in self.parameters():
            # Each rank sees a part of the sequence then.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._register_load_state_dict_pre_hook(allow_no_extra_state)

    def _draw(self, init_method: Callable[[torch.Tensor], Any], *, on_cpu: bool) -> None:
        if on_cpu:
            init_method(self.weight)
            return
        name = get_data_parallel_rng_tracker_name()
        with draws_unseeded(), get_cuda_rng_tracker().fork(name):
            init_method(self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, and the bias that is left to add where it is skipped."""
        if self.skip_bias_add:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias), None

    def backward_dw(self) -> None:
        """Weight gradients are computed in the backward pass; none is delayed."""

    def get_extra_state(self) -> None:
        """Hold the place of the state that Transformer Engine's layers have under fp8."""

    def set_extra_state(self, state: object) -> None:
        """There is none."""


class TEColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's `ColumnParallelLinear`, for experts too."""

    def __init__(
        self,
        *sizes: int,
        config: TransformerConfig,
        gather_output: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        name: str | None = None,
        **arguments: Any,
    ) -> None:
        check_supported(config)
        _refuse(
            gather_output=gather_output, skip_weight_param_allocation=skip_weight_param_allocation
        )
        with draws_unseeded():
            super().__init__(*sizes, config=config, is_expert=is_expert, **arguments)
        if is_expert:
            _leave_to_dispatcher(self)


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    """A norm of the input and a column-parallel layer, in one module: `layer_norm_weight`, `_bias`.

    Takes `[s, b, h]` (under sequence parallelism `[s / tp, b, h]`); every tensor-parallel rank has
    the norm whole.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        is_expert: bool,
        **arguments: Any,
    ) -> None:
        _refuse(is_expert=is_expert)
        super().__init__(input_size, output_size, config=config, is_expert=False, **arguments)
        self.layer_norm_weight, self.layer_norm_bias = norm_parameters(config, input_size)
        for name in ("weight", "bias"):
            # After the norm's, which is Transformer Engine's order: optimizers number parameters.
            self._parameters[name] = self._parameters.pop(name)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `[s, b, n / tp]`, and the bias that is left to add if skipped."""
        config = self.config
        x = normalize(
            x, self.layer_norm_weight, self.layer_norm_bias, config, config.layernorm_epsilon
        )
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(x)
        return output

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Offset, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the shards, of all data-parallel ranks where `metadata` does not name a group."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state


class TELayerNormColumnParallelLinearGathered(TELayerNormColumnParallelLinear):
    """One layer in the place of an attention or MLP, as models pruned layer by layer have it.

    Takes and returns `[s, b, h]` (under sequence parallelism `[s / tp, b, h]`).
    """

    def __init__(
        self, config: TransformerConfig, tp_comm_buffer_name: str, *unused: object, **more: object
    ) -> None:
        super().__init__(
            config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=tp_comm_buffer_name,
        )

    def forward(self, x: torch.Tensor, **unused: object) -> tuple[torch.Tensor, None]:
        """Return the whole output; no bias is left to add."""
        output, _ = super().forward(x)
        if not self.config.sequence_parallel:
            return gather_from_tensor_model_parallel_region(output, group=self.tp_group), None
        # Where the other ranks' channels will be there are zeros: their sum is all channels.
        channels, rank = output.shape[-1], self.tp_group.rank()
        after = self.config.hidden_size - (rank + 1) * channels
        output = F.pad(output, (rank * channels, after))
        return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group), None


class TERowParallelLinear(RowParallelLinear):
    """Megatron-Core's `RowParallelLinear`, for experts too."""

    def __init__(
        self,
        *sizes: int,
        config: TransformerConfig,
        input_is_parallel: bool,
        is_expert: bool,
        name: str | None = None,
        **arguments: Any,
    ) -> None:
        check_supported(config)
        _refuse(input_is_not_parallel=not input_is_parallel)
        with draws_unseeded():
            super().__init__(
                *sizes, config=config, input_is_parallel=True, is_expert=is_expert, **arguments
            )
        if is_expert:
            _leave_to_dispatcher(self)


def _leave_to_dispatcher(linear: ColumnParallelLinear | RowParallelLinear) -> None:
    """Let an expert's layer communicate nothing, whatever the layout: the dispatcher does."""
    linear.explicit_expert_comm = True
    reduce_as_experts(linear)


def _refuse(**wishes: bool) -> None:
    """Raise ValueError for what Transformer Engine's own layers refuse."""
    for wish, is_wanted in wishes.items():
        if is_wanted:
            raise ValueError(f"Transformer Engine's linear layers have no {wish}")
