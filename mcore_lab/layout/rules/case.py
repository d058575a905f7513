"""What the rules judge: a layout, a model, its data and a number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mcore_lab.layout.rules.report import Amount, BrokenRule

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout


class ModelShape(Protocol):
    """The numbers of a model that a layout divides, by Megatron-Core's names."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int | None: ...
    @property
    def ffn_hidden_size(self) -> int | None: ...
    @property
    def num_moe_experts(self) -> int | None: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def max_sequence_length(self) -> int | None: ...
    @property
    def transformer(self) -> Mapping[str, Any]: ...


class DataShape(Protocol):
    """The numbers of the data that a layout divides."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def global_batch_size(self) -> int: ...
    @property
    def pack_documents(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout, for one model and its data, on so many ranks."""

    layout: ParallelLayout
    model: ModelShape
    data: DataShape
    world_size: int

    def of_model(self, name: str, default: Any = None) -> Any:
        """Return a field of the model, also one of `model.transformer`; `default` if not set."""
        value = getattr(self.model, name, None)
        if value is None:
            value = self.model.transformer.get(name)
        return default if value is None else value

    def model_amount(self, name: str, default: int = 0) -> Amount:
        """Return a number of the model with the flag that sets it."""
        own = hasattr(self.model, name)
        flag = f"--model.{_dashed(name)}" if own else f"--model.transformer.{name}"
        return Amount(name, self.of_model(name, default), f"{flag} {{}}")

    def data_amount(self, name: str) -> Amount:
        """Return a number of the data with the flag that sets it."""
        return Amount(name, getattr(self.data, name), f"--data.{_dashed(name)} {{}}")


Rule: TypeAlias = Callable[[Case], Iterator[BrokenRule]]
"""Yields whatever a case breaks of one rule."""


def _dashed(name: str) -> str:
    return name.replace("_", "-")
