"""The parallel sizes of a run, and what follows from them: groups, coordinates, broken rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mcore_lab.errors import LayoutError
from mcore_lab.layout.rules import broken_rules
from mcore_lab.layout.rules.case import Case, DataShape, ModelShape
from mcore_lab.layout.rules.report import BrokenRule
from mcore_lab.layout.rules.world import (
    broken_by_the_layout_alone,
    world_holds_dense,
    world_holds_experts,
)

if TYPE_CHECKING:
    from mcore_lab.layout.grid import Coordinates, RankGrid

SHORT_NAMES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "sp": "sequence_parallel",
}
"""The short names of a layout's fields, on the command line and in messages."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How a model is spread over ranks: Megatron-Core's own sizes, by its own names."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers that each pipeline rank holds, interleaved; one if not set."""
    context_parallel_size: int = 1
    """Ranks that split each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that split the experts; they are taken from the same world, not added to it."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert's weights; as many as tensor-parallel ranks if not set."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel layers by sequence."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state over data-parallel ranks."""
    order: str = "tp-cp-ep-dp-pp"
    """Which dimension's ranks are neighbours, the closest first."""

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return self.pipeline_model_parallel_size

    @property
    def vpp(self) -> int:
        """Model chunks of a pipeline rank; 1 without interleaving."""
        size = self.virtual_pipeline_model_parallel_size
        return 1 if size is None else size

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        return self.context_parallel_size

    @property
    def ep(self) -> int:
        """Expert-parallel size."""
        return self.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Expert-tensor-parallel size."""
        size = self.expert_tensor_parallel_size
        return self.tp if size is None else size

    @property
    def sp(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.sequence_parallel

    @property
    def sequence_multiple(self) -> int:
        """What the tokens of a sequence are padded to a multiple of, so that ranks can share it.

        Context parallelism cuts it into `2 * cp` chunks, sequence parallelism each rank's into tp.
        Source: `get_padding` of megatron/core/models/multimodal/context_parallel.py.
        """
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)

    def padded(self, sequence_length: int) -> int:
        """Return the length to which a sequence of `sequence_length` tokens is padded."""
        return -(-sequence_length // self.sequence_multiple) * self.sequence_multiple

    def resized(self, **sizes: int) -> ParallelLayout:
        """Return the same layout with other sizes, by their short names: `layout.resized(tp=2)`."""
        fields: dict[str, Any] = {SHORT_NAMES[name]: size for name, size in sizes.items()}
        return replace(self, **fields)

    def data_parallel_size(self, world_size: int) -> int:
        """Return the replicas of the model in a world of `world_size`, or raise `LayoutError`."""
        _refuse(list(world_holds_dense(self, world_size)))
        return world_size // (self.tp * self.cp * self.pp)

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Return the replicas of each expert in a world of `world_size`, or raise `LayoutError`."""
        _refuse(list(world_holds_experts(self, world_size)))
        return world_size // (self.etp * self.ep * self.pp)

    def model_parallel_sizes(self) -> dict[str, Any]:
        """Return the arguments of `megatron.core.parallel_state.initialize_model_parallel`."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self._interleaving,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "order": self.order,
        }

    def transformer_fields(self) -> dict[str, Any]:
        """Return the fields of Megatron-Core's `TransformerConfig` that the layout decides."""
        fields: dict[str, Any] = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self._interleaving,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "sequence_parallel": self.sp,
        }
        if self.vpp > 1:
            # Megatron-Core's defaults are the reverse; between two interleaved stages they pair
            # sends and receives wrongly, and training goes on with wrong gradients.
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        return fields

    @property
    def _interleaving(self) -> int | None:
        # To Megatron-Core any number, 1 too, asks for the interleaved schedule.
        return self.vpp if self.vpp > 1 else None

    def check(self, model: ModelShape, data: DataShape, world_size: int) -> list[BrokenRule]:
        """Return every rule that this layout breaks for `model` and `data` on `world_size` ranks.

        The order is stable. A number below 1 is reported without the rules that compute with it.
        """
        return broken_rules(Case(layout=self, model=model, data=data, world_size=world_size))

    def require(self, model: ModelShape, data: DataShape, world_size: int) -> None:
        """Raise `LayoutError` with all broken rules, one a line, if there are any."""
        _refuse(self.check(model, data, world_size))

    def require_world(self, world_size: int) -> None:
        """Raise `LayoutError` with all that the layout itself breaks there, whatever the model."""
        _refuse(broken_by_the_layout_alone(self, world_size))

    def coordinates(self, rank: int, world_size: int) -> Coordinates:
        """Return where `rank` stands in the dense and in the expert grid."""
        from mcore_lab.layout.grid import Coordinates

        dense = self._dense_grid(world_size).coordinates(rank)
        experts = self._expert_grid(world_size).coordinates(rank)
        return Coordinates(**dense, **{axis: experts[axis] for axis in ("ep", "etp", "edp")})

    def rank_of(
        self, *, world_size: int, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0
    ) -> int:
        """Return the rank at these coordinates of the dense grid."""
        return self._dense_grid(world_size).rank_of(tp=tp, cp=cp, dp=dp, pp=pp)

    def groups(self, kind: str, world_size: int) -> list[tuple[int, ...]]:
        """Return the ranks of each process group of one kind.

        A kind is one axis, or several joined with `-`: `tp`, `cp`, `dp`, `pp` of the dense grid
        (`dp-cp`, `tp-pp`, …), or `etp`, `ep`, `edp`, `pp` of the expert grid (`etp-ep-pp`, …); or
        `embedding` and `position-embedding`, to which only the outer pipeline stages belong.
        """
        from mcore_lab.layout.grid import groups_of_kind

        return groups_of_kind(kind, self._dense_grid(world_size), self._expert_grid(world_size))

    def _dense_grid(self, world_size: int) -> RankGrid:
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp}
        return self._grid({**sizes, "dp": self.data_parallel_size(world_size)})

    def _expert_grid(self, world_size: int) -> RankGrid:
        sizes = {"etp": self.etp, "ep": self.ep, "pp": self.pp}
        return self._grid({**sizes, "edp": self.expert_data_parallel_size(world_size)})

    def _grid(self, sizes: dict[str, int]) -> RankGrid:
        # Importing numpy takes longer than all the rules together, which do without it.
        from mcore_lab.layout.grid import RankGrid

        return RankGrid.in_order(self.order, sizes)


def _refuse(broken: list[BrokenRule]) -> None:
    if broken:
        raise LayoutError("\n".join(map(str, broken)))
