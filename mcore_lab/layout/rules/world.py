"""Rules of the sizes themselves: positive, laid out in one order, and filling the world."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import Amount, BrokenRule, multiple_of

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout

_DENSE = ("tp", "cp", "pp")
_EXPERT = ("etp", "ep", "pp")
_FOLDED = " (ep and etp fold into the world, they do not multiply it)"
_DEFAULT_ORDER = "tp-cp-ep-dp-pp"

_POSITIVE_IN_MODEL = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "num_moe_experts",
    "vocab_size",
)
_POSITIVE_IN_DATA = ("sequence_length", "micro_batch_size", "global_batch_size")


def numbers_are_positive(case: Case) -> Iterator[BrokenRule]:
    """Every size and every amount that is divided is at least 1."""
    yield from _sizes_are_positive(case.layout, case.world_size)
    amounts = [
        *(case.model_amount(name, default=1) for name in _POSITIVE_IN_MODEL),
        *(case.data_amount(name) for name in _POSITIVE_IN_DATA),
    ]
    yield from _at_least_one(amounts)


def broken_by_the_layout_alone(layout: ParallelLayout, world_size: int) -> list[BrokenRule]:
    """Return what is broken whatever the model; if a size is below 1, only that."""
    rules = (_order_names_each_dimension, _world_is_filled, _pipelines_agree)
    below_one = list(_sizes_are_positive(layout, world_size))
    return below_one or [broken for rule in rules for broken in rule(layout, world_size)]


def sizes_are_set_in_the_layout(case: Case) -> Iterator[BrokenRule]:
    """`model.transformer` holds no other value for what the layout decides."""
    own_rule = ("overlap_p2p_comm", "batch_p2p_comm")
    for name, size in case.layout.transformer_fields().items():
        given = case.model.transformer.get(name)
        if given not in (None, size) and name not in own_rule:
            yield BrokenRule(
                rule=f"{name} is the layout's to set, not model.transformer's",
                numbers=f"model.transformer has {given}, the layout {size}",
                fix=f"--layout.{name.replace('_', '-')} {given}, and leave it out of the model",
            )


def order_names_each_dimension(case: Case) -> Iterator[BrokenRule]:
    """The order has a place for each dimension of more than one rank, in either grid.

    Source: `RankGenerator` of megatron/core/parallel_state.py, 0.16.1 to 0.19.
    """
    yield from _order_names_each_dimension(case.layout, case.world_size)


def _order_names_each_dimension(layout: ParallelLayout, world_size: int) -> Iterator[BrokenRule]:
    if not _places_dimensions(layout, world_size):
        yield BrokenRule(
            rule="order must name each of tp, cp, ep, dp and pp once; "
            "one of size 1 may be left out",
            numbers=f"order {layout.order!r}",
            fix=f"--layout.order {_DEFAULT_ORDER}",
        )


def world_is_filled(case: Case) -> Iterator[BrokenRule]:
    """The world is a whole number of replicas of the model, and of the experts."""
    yield from _world_is_filled(case.layout, case.world_size)


def _world_is_filled(layout: ParallelLayout, world_size: int) -> Iterator[BrokenRule]:
    yield from world_holds_dense(layout, world_size)
    # Without experts of other sizes the second rule only repeats the first.
    if (layout.tp * layout.cp) % (layout.etp * layout.ep):
        yield from world_holds_experts(layout, world_size)


def world_holds_dense(layout: ParallelLayout, world_size: int) -> Iterator[BrokenRule]:
    """The world is a multiple of tp * cp * pp."""
    note = _FOLDED if layout.ep > 1 or layout.etp != layout.tp else ""
    yield from _world_is_multiple(layout, world_size, _DENSE, note)


def world_holds_experts(layout: ParallelLayout, world_size: int) -> Iterator[BrokenRule]:
    """The same world is a multiple of etp * ep * pp."""
    yield from _world_is_multiple(layout, world_size, _EXPERT, _FOLDED)


def pipelines_agree(case: Case) -> Iterator[BrokenRule]:
    """The dense and the expert grid have the same pipelines, as one model needs.

    Source: the assertions of `parallel_state.initialize_model_parallel`.
    """
    yield from _pipelines_agree(case.layout, case.world_size)


def _pipelines_agree(layout: ParallelLayout, world_size: int) -> Iterator[BrokenRule]:
    # With pp last, a stage is one block of ranks, and the same one in both grids.
    if layout.pp == 1 or layout.order.endswith("pp"):
        return
    if not _fills(world_size, layout) or not _places_dimensions(layout, world_size):
        return
    dp, edp = layout.data_parallel_size(world_size), layout.expert_data_parallel_size(world_size)
    dense = _pipeline_stride(layout.order, {"tp": layout.tp, "cp": layout.cp, "dp": dp})
    experts = _pipeline_stride(layout.order, {"tp": layout.etp, "ep": layout.ep, "dp": edp})
    if dp != edp or dense != experts:
        yield BrokenRule(
            rule="unless pp is last in the order, dense layers and experts must have the same dp "
            "and the same pipelines",
            numbers=f"order {layout.order}, dp {dp} and {edp}, "
            f"next stage {dense} and {experts} ranks away",
            fix=f"--layout.order {_with_pp_last(layout.order)}",
        )


def _world_is_multiple(
    layout: ParallelLayout, world_size: int, sizes: tuple[str, ...], note: str
) -> Iterator[BrokenRule]:
    ranks = Amount("world size", world_size, "{} ranks")
    below_one = list(_sizes_are_positive(layout, world_size))
    yield from below_one or multiple_of(layout, ranks, sizes, works=_fills, note=note)


def _sizes_are_positive(layout: ParallelLayout, world_size: int) -> Iterator[BrokenRule]:
    # etp is tp's echo where it is not set.
    names = ["tp", "cp", "ep", "pp", "vpp"]
    names += [] if layout.expert_tensor_parallel_size is None else ["etp"]
    sizes = [Amount(name, getattr(layout, name), f"--layout.{name} {{}}") for name in names]
    yield from _at_least_one([Amount("world size", world_size, "{} rank"), *sizes])


def _at_least_one(amounts: Iterable[Amount]) -> Iterator[BrokenRule]:
    for amount in amounts:
        if amount.value < 1:
            yield BrokenRule(
                rule=f"{amount.name} must be at least 1",
                numbers=f"{amount.name} {amount.value}",
                fix=amount.setting.format(1),
            )


def _fills(world_size: int, layout: ParallelLayout) -> bool:
    dense = layout.tp * layout.cp * layout.pp
    experts = layout.etp * layout.ep * layout.pp
    return world_size % dense == 0 and world_size % experts == 0


def _pipeline_stride(order: str, sizes: dict[str, int]) -> int:
    closer = order.split("pp")[0].split("-")
    return prod(sizes.get(name, 1) for name in closer)


def _with_pp_last(order: str) -> str:
    return "-".join([name for name in order.split("-") if name != "pp"] + ["pp"])


def _places_dimensions(layout: ParallelLayout, world_size: int) -> bool:
    names = layout.order.split("-")
    sizes = {"tp": max(layout.tp, layout.etp), "cp": layout.cp, "ep": layout.ep, "pp": layout.pp}
    replicated = world_size > min(layout.tp * layout.cp, layout.etp * layout.ep) * layout.pp
    sizes["dp"] = 2 if replicated else 1
    return set(names) <= set(sizes) and all(
        names.count(name) == 1 for name, size in sizes.items() if size > 1
    )


RULES: tuple[Rule, ...] = (
    sizes_are_set_in_the_layout,
    order_names_each_dimension,
    world_is_filled,
    pipelines_agree,
)
