"""Transformer Engine's grouped linear layers: each local expert's weight under its own name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from mcore_lab.backends.experts import Offset, reduce_as_experts
from mcore_lab.backends.grouped_linear import GroupedLinear, grouped_product, per_token
from mcore_lab.backends.transformer_engine.refusals import check_supported
from mcore_lab.backends.transformer_engine.unseeded import draws_unseeded


class TEGroupedLinear(GroupedLinear):
    """A linear layer of each local expert: `weight0` `[out, in]`, `bias0` `[out]`, `weight1`, …

    Takes the tokens `[t, in]` of all local experts, expert by expert. In checkpoints it is the
    same layer of as many experts, one after the other.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: object,
    ) -> None:
        check_supported(config)
        if not is_expert:
            raise ValueError("Transformer Engine's grouped linear layers are for experts only")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        is_column = parallel_mode == "column"
        with draws_unseeded():
            super().__init__(
                num_gemms,
                input_size,
                output_size,
                config=config,
                init_method=init_method,
                bias=bias,
                skip_bias_add=skip_bias_add,
                pg_collection=pg_collection,
                partition_dim=0 if is_column else 1,
                stride=2 if is_column and config.gated_linear_unit else 1,
            )
        self.num_gemms, self.use_bias, self.dp_group = num_gemms, bias, pg_collection.expt_dp
        self._take_apart()
        reduce_as_experts(self)
        self._register_load_state_dict_pre_hook(self._merge_extra_states)

    def _take_apart(self) -> None:
        stacked = {name: parameter.detach() for name, parameter in self.named_parameters()}
        for name in stacked:
            delattr(self, name)
            for expert, tensor in enumerate(stacked[name]):
                parameter = torch.nn.Parameter(tensor.clone())
                if self.partition_dim < tensor.dim():
                    set_tensor_model_parallel_attributes(parameter, True, self.partition_dim, 1)
                self.register_parameter(f"{name}{expert}", parameter)

    def _of_experts(self, name: str) -> list[torch.Tensor]:
        return [getattr(self, f"{name}{expert}") for expert in range(self.num_gemms)]

    def forward(self, tokens: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, Any]:
        """Return the output `[t, out]`, and a list of the biases where adding them is skipped."""
        output = grouped_product(tokens, torch.stack(self._of_experts("weight")), m_splits)
        if not self.use_bias:
            return output, None
        biases = self._of_experts("bias")
        if self.skip_bias_add:
            return output, biases
        return output + per_token(torch.stack(biases), m_splits), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Offset, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return each local expert's shards, placed as those of a layer for one expert are.

        `prefix` is the layer's name in the experts' module, which puts its own name before it.
        """
        apart = bool((metadata or {}).get("singleton_local_shards"))
        experts = self.ep_group.size() * self.num_gemms
        names = ("weight", "bias") if self.use_bias else ("weight",)
        state: dict[str, Any] = {}
        for expert in range(self.num_gemms):
            number = self.ep_group.rank() * self.num_gemms + expert
            place = (len(sharded_offsets), number, experts)
            tensors: dict[str, Any] = {name: getattr(self, f"{name}{expert}") for name in names}
            shards = make_sharded_tensors_for_checkpoint(
                tensors | {"_extra_state": None},
                f"{number}.{prefix}" if apart else prefix,
                {"weight": 0, "bias": 0} if self.partition_dim == 0 else {"weight": 1},
                sharded_offsets if apart else (*sharded_offsets, place),
                tp_group=self.tp_group,
                dp_cp_group=self.dp_group,
            )
            for key, shard in shards.items():
                name = key.rpartition(".")[2]
                # The first extra state has the name of the only one that `state_dict` has.
                suffix = expert if name in names or expert else ""
                state[f"{prefix}{name}{suffix}"] = shard
        return state

    def _merge_extra_states(self, state: dict[str, object], prefix: str, *_: object) -> None:
        for expert in range(1, self.num_gemms):
            state.pop(f"{prefix}_extra_state{expert}", None)
        state.setdefault(f"{prefix}_extra_state", None)


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    """Grouped linear layers whose outputs expert tensor parallelism splits."""

    def __init__(self, *sizes: int, **arguments: Any) -> None:
        super().__init__(*sizes, parallel_mode="column", **arguments)


class TERowParallelGroupedLinear(TEGroupedLinear):
    """Grouped linear layers whose inputs expert tensor parallelism splits."""

    def __init__(self, *sizes: int, **arguments: Any) -> None:
        super().__init__(*sizes, parallel_mode="row", **arguments)
