"""Every layout of a number of ranks, and which of them the rules allow. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout

_INTERLEAVED = (None, 2)


def layouts_of(world_size: int, *, experts: bool) -> Iterator[ParallelLayout]:
    """Yield each layout of `world_size` ranks: all sizes that fill it, with and without options.

    Options are interleaving by two chunks a stage, sequence parallelism, and the distributed
    optimizer; each where its sizes give it something to do.
    """
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp, cp, pp in product(divisors, repeat=3):
        if world_size % (tp * cp * pp):
            continue
        replicas = world_size // (tp * pp)
        for vpp, sp, split_optimizer, (ep, etp) in product(
            _INTERLEAVED if pp > 1 else (None,),
            (False, True) if tp > 1 else (False,),
            (False, True) if replicas > 1 else (False,),
            _expert_sizes(world_size // pp, divisors) if experts else [(1, None)],
        ):
            yield ParallelLayout(
                tensor_model_parallel_size=tp,
                context_parallel_size=cp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                sequence_parallel=sp,
                use_distributed_optimizer=split_optimizer,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
            )


def _expert_sizes(ranks: int, divisors: list[int]) -> list[tuple[int, int]]:
    return [(ep, etp) for ep, etp in product(divisors, repeat=2) if ranks % (ep * etp) == 0]


def allowed_layouts(
    recipe: Recipe, most_ranks: int
) -> tuple[list[tuple[int, ParallelLayout]], int]:
    """Return the worlds and layouts up to `most_ranks` that break no rule, and how many do."""
    allowed, refused = [], 0
    for world_size in range(1, most_ranks + 1):
        for layout in layouts_of(world_size, experts=bool(recipe.model.num_moe_experts)):
            if layout.check(recipe.model, recipe.data, world_size):
                refused += 1
            else:
                allowed.append((world_size, layout))
    return allowed, refused
