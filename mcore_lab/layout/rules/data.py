"""Rules of the data: how sequences and batches are split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mcore_lab.layout.rules.case import Case, Rule
from mcore_lab.layout.rules.report import (
    BrokenRule,
    either,
    multiple_of,
    other_amounts,
)

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout

_GROUP = "microbatch_group_size_per_vp_stage"


def sequence_fits_the_model(case: Case) -> Iterator[BrokenRule]:
    """The model takes sequences as long as the data's."""
    longest = case.model_amount("max_sequence_length")
    length = case.data_amount("sequence_length")
    if 0 < longest.value < length.value:
        yield BrokenRule(
            rule="max_sequence_length must not be below sequence_length",
            numbers=f"max_sequence_length {longest.value}, sequence_length {length.value}",
            fix=either(longest.setting.format(length.value), length.setting.format(longest.value)),
        )


def sequence_splits(case: Case) -> Iterator[BrokenRule]:
    """Each rank has as many tokens of each sequence; a context-parallel one has two chunks.

    Source: `get_padding` of `megatron/core/models/multimodal/context_parallel.py`.
    """
    layout = case.layout
    sizes = ["cp"] * (layout.cp > 1) + ["tp"] * layout.sp

    def splits(length: int, other: ParallelLayout) -> bool:
        return length % _sequence_unit(other) == 0

    yield from multiple_of(
        layout,
        case.data_amount("sequence_length"),
        sizes,
        factor=2 if layout.cp > 1 else 1,
        works=splits,
    )


def batch_divides(case: Case) -> Iterator[BrokenRule]:
    """A global batch is a whole number of micro-batches on every replica."""
    batch, micro = case.data_amount("global_batch_size"), case.data_amount("micro_batch_size")
    dp = _replicas(case)
    if not dp or batch.value % (micro.value * dp) == 0:
        return
    yield BrokenRule(
        rule="global_batch_size must be a multiple of micro_batch_size * dp",
        numbers=f"global_batch_size {batch.value}, micro_batch_size * dp = "
        f"{micro.value} * {dp} = {micro.value * dp}",
        fix=either(
            other_amounts(batch, lambda n: _batch_fits(case, n, micro.value, dp)),
            other_amounts(micro, lambda n: _batch_fits(case, batch.value, n, dp), batch.value),
        ),
    )


def micro_batch_groups_reach_all_stages(case: Case) -> Iterator[BrokenRule]:
    """Interleaving takes at least as many micro-batches at a time as there are stages."""
    group, pp = case.model_amount(_GROUP, default=case.layout.pp), case.layout.pp
    if case.layout.vpp > 1 and group.value < pp:
        yield BrokenRule(
            rule=f"{_GROUP} must not be below pp",
            numbers=f"{_GROUP} {group.value}, pp {pp}",
            fix=group.setting.format(pp),
        )


def interleaving_has_micro_batches(case: Case) -> Iterator[BrokenRule]:
    """The interleaved schedule takes micro-batches in whole groups, of pp if no size is set."""
    batch, micro = case.data_amount("global_batch_size"), case.data_amount("micro_batch_size")
    dp, group = _replicas(case), _micro_batch_group(case)
    if not dp or batch.value % (micro.value * dp):
        return
    count = batch.value // (micro.value * dp)
    if _micro_batches_fit(case, count):
        return
    rest = "" if group == case.layout.pp else ", or a rest of pp or more"
    yield BrokenRule(
        rule=f"interleaving needs micro-batches in whole groups{rest}",
        numbers=f"micro-batches {batch.value} / ({micro.value} * {dp}) = {count}, group {group}, "
        f"pp {case.layout.pp}",
        fix=either(
            other_amounts(batch, lambda n: _batch_fits(case, n, micro.value, dp)),
            other_amounts(micro, lambda n: _batch_fits(case, batch.value, n, dp), batch.value),
        ),
    )


def _sequence_unit(layout: ParallelLayout) -> int:
    return (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1)


def _replicas(case: Case) -> int | None:
    """Return dp, or nothing where the world is not a whole number of replicas."""
    dp, rest = divmod(case.world_size, case.layout.tp * case.layout.cp * case.layout.pp)
    return None if rest else dp


def _batch_fits(case: Case, batch: int, micro: int, dp: int) -> bool:
    count, rest = divmod(batch, micro * dp)
    return rest == 0 and _micro_batches_fit(case, count)


def _micro_batches_fit(case: Case, count: int) -> bool:
    if case.layout.vpp == 1 or case.layout.pp == 1:
        return True
    group = _micro_batch_group(case)
    return count >= group and (count % group == 0 or count % group >= case.layout.pp)


def _micro_batch_group(case: Case) -> int:
    group: int = case.of_model(_GROUP, case.layout.pp)
    return max(group, case.layout.pp)


RULES: tuple[Rule, ...] = (
    sequence_fits_the_model,
    sequence_splits,
    batch_divides,
    micro_batch_groups_reach_all_stages,
    interleaving_has_micro_batches,
)
