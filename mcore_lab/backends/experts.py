"""The experts of a mixture-of-experts layer: all in one product, or one after the other."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from mcore_lab.backends.grouped_linear import GroupedLinear, per_token

Offset = tuple[int, int, int]
"""Of a sharded tensor: an axis, which part of it this is, and how many parts it has."""


class SequentialExperts(SequentialMLP):
    """Megatron-Core's `SequentialMLP`, with gradients reduced over the right ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reduce_as_experts(self)
        for expert in self.local_experts:
            # Dispatchers communicate for experts. Megatron-Core's linear layers know it where they
            # are split; where they are not, what they return cannot have a bias added in place.
            expert.linear_fc1.explicit_expert_comm = True
            expert.linear_fc2.explicit_expert_comm = True


class GroupedExperts(TEGroupedMLP):
    """Megatron-Core's `TEGroupedMLP` on linear layers of pure PyTorch: one product for all experts.

    Takes the local experts' tokens `[t, h]`, expert by expert, how many are each one's, `[e]`, and
    the router's probabilities, `[t]`. Returns `[t, h]`, under expert tensor parallelism the partial
    sums that Megatron-Core's dispatchers add up, and no bias. In checkpoints it is a
    `SequentialMLP`, and reads what one has written.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        **name: str | None,
    ) -> None:
        outputs = {"partition_dim": 0, "stride": 2 if config.gated_linear_unit else 1}
        linears = MLPSubmodules(
            linear_fc1=ModuleSpec(module=GroupedLinear, params=outputs),
            linear_fc2=ModuleSpec(module=GroupedLinear, params={"partition_dim": 1}),
            activation_func=submodules.activation_func,
        )
        super().__init__(num_local_experts, config, linears, pg_collection, **name)
        self.dp_group = pg_collection.expt_dp
        reduce_as_experts(self)

    @staticmethod
    def _apply_bias(
        output: torch.Tensor,
        bias: torch.Tensor | None,
        tokens_per_expert: list[int],
        permuted_probs: torch.Tensor,
    ) -> torch.Tensor:
        if bias is None:
            return output
        return (output + per_token(bias, tokens_per_expert) * permuted_probs).to(output.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Offset, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return what `SequentialMLP` does: a shard for each expert and each half of a gate."""
        state: dict[str, Any] = {}
        apart = bool((metadata or {}).get("singleton_local_shards"))
        for layer in ("linear_fc1", "linear_fc2"):
            shards = _Shards(self, layer, sharded_offsets, apart=apart)
            for name, parameter in getattr(self, layer).named_parameters():
                key = f"{prefix}experts.{layer}.{name}"
                state[f"{prefix}{layer}.{name}"] = shards.factory(key, parameter)
            key = f"{prefix}experts.{layer}._extra_state"
            state[f"{prefix}{layer}._extra_state"] = shards.extra_states(key)
        return state


class _Shards:
    """The shards of one linear layer's experts, named and placed as `SequentialMLP` does.

    `apart` gives each expert a name of its own (the metadata's `singleton_local_shards`); else they
    are parts of one tensor with an axis for the experts.
    """

    def __init__(
        self, experts: GroupedExperts, layer: str, offsets: tuple[Offset, ...], *, apart: bool
    ) -> None:
        linear: GroupedLinear = getattr(experts, layer)
        self._layer, self._offsets, self._apart = layer, offsets, apart
        self._split_axis, self._stride = linear.partition_dim, linear.stride
        self._local, self._all = len(linear.weight), len(linear.weight) * experts.ep_group.size()
        self._first = self._local * experts.ep_group.rank()
        self._tp_rank, self._tp_size = experts.tp_group.rank(), experts.tp_group.size()
        self._dp_rank = experts.dp_group.rank()

    def factory(self, key: str, parameter: torch.nn.Parameter) -> ShardedTensorFactory:
        """Return what makes the shards of a stacked parameter, or of its optimizer state."""
        is_split = self._split_axis < parameter.dim() - 1
        replica = (0, 0 if is_split else self._tp_rank, self._dp_rank)

        def build(key: str, stacked: torch.Tensor, replica: Any, _: slice | None) -> Any:
            return [self._of_expert(key, i, one, replica) for i, one in enumerate(stacked)]

        def merge(shards: list[list[torch.Tensor]]) -> torch.Tensor:
            return torch.stack([torch.cat(pieces) for pieces in shards])

        return ShardedTensorFactory(key, parameter, build, merge, replica)

    def _of_expert(
        self, key: str, expert: int, tensor: torch.Tensor, replica: Any
    ) -> list[ShardedTensor]:
        key, offsets = self._place(key, expert)
        stride = self._stride
        shards = []
        for number, piece in enumerate(tensor.detach().chunk(stride)):
            name, part, parts = key, number * self._tp_size + self._tp_rank, stride * self._tp_size
            if self._apart and stride > 1:
                name, part, parts = f"{key}_{'wv'[number]}", self._tp_rank, self._tp_size
            split = ((len(offsets) + self._split_axis, part, parts),)
            shards.append(
                ShardedTensor.from_rank_offsets(
                    name,
                    piece.contiguous(),
                    *offsets,
                    *(split if self._split_axis < piece.dim() else ()),
                    replica_id=replica,
                    prepend_axis_num=len(offsets),
                )
            )
        return shards

    def _place(self, key: str, expert: int) -> tuple[str, tuple[Offset, ...]]:
        """Return the name of a local expert's tensor, and the axes that come before its own."""
        number = self._first + expert
        if self._apart:
            head, layer, name = key.rpartition(self._layer)
            return f"{head}{number}.{layer}{name}", self._offsets
        return key, (*self._offsets, (len(self._offsets), number, self._all))

    def extra_states(self, key: str) -> list[ShardedObject]:
        """Return the empty states that stand for Transformer Engine's in every checkpoint."""
        replica = (0, self._tp_rank, self._dp_rank)
        places = [self._place(key, expert) for expert in range(self._local)]
        return [make_sharded_object_for_checkpoint(None, *place, replica) for place in places]


def reduce_as_experts(experts: torch.nn.Module) -> None:
    """Mark the parameters of experts for what they are, whatever the layout.

    Their gradients are summed over expert-data-parallel ranks (`allreduce` False). Megatron-Core
    says so under expert parallelism only, before 0.19: with etp other than tp it would sum
    gradients of other experts. One rule for all layouts gives the experts an optimizer of their
    own on each, so that its checkpoints can be read on others.
    A bias is no sequence-parallel parameter, although Megatron-Core says so: it would be summed
    over ranks that hold other experts. And no two ranks of the gradient norm's group hold the same
    parameter of an expert, so each counts.
    """
    for parameter in experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
