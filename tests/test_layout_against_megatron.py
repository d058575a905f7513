"""The grid of a layout's ranks, held against the groups that Megatron-Core builds or refuses."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from fake_ranks import GROUPS, initialize, is_refused, parallel_state, rank_of_world
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import Data, Model, layout_of

from mcore_lab.layout import ParallelLayout

LAYOUTS = [
    (layout_of(), 1),
    (layout_of(), 4),
    (layout_of(tp=2), 2),
    (layout_of(tp=2, pp=2), 8),
    (layout_of(pp=4), 8),
    (layout_of(tp=2, cp=2, pp=2), 8),
    (layout_of(cp=2), 8),
    (layout_of(ep=4), 8),
    (layout_of(tp=2, ep=2), 8),
    (layout_of(tp=2, ep=2, etp=1), 2),
    (layout_of(tp=2, cp=2, ep=4, etp=1), 8),
    (layout_of(tp=1, ep=2, etp=2), 8),
    (layout_of(tp=2, pp=2, ep=4, etp=1), 8),
    (layout_of(tp=2, cp=2, pp=2, ep=2, etp=2), 16),
    (layout_of(tp=2, cp=3, pp=2, ep=3, etp=1), 24),
    (layout_of(tp=2, cp=2, pp=2, order="cp-tp-ep-dp-pp"), 16),
    (layout_of(tp=2, pp=2, ep=2, order="dp-tp-cp-ep-pp"), 8),
    (layout_of(tp=2, pp=2, ep=2, etp=2, cp=2, order="tp-ep-cp-pp-dp"), 16),
    (layout_of(tp=2, pp=2, order="tp-pp-dp-cp-ep"), 8),
    (layout_of(tp=2, pp=2, order="pp-dp-cp-ep-tp"), 8),
]

COORDINATES = {
    "tp": parallel_state.get_tensor_model_parallel_rank,
    "cp": parallel_state.get_context_parallel_rank,
    "dp": parallel_state.get_data_parallel_rank,
    "pp": parallel_state.get_pipeline_model_parallel_rank,
    "ep": parallel_state.get_expert_model_parallel_rank,
    "etp": parallel_state.get_expert_tensor_parallel_rank,
    "edp": parallel_state.get_expert_data_parallel_rank,
}

every_layout = pytest.mark.parametrize(
    ("layout", "world_size"),
    LAYOUTS,
    ids=[
        f"{world}-ranks-tp{at.tp}-cp{at.cp}-pp{at.pp}-ep{at.ep}-etp{at.etp}-{at.order}"
        for at, world in LAYOUTS
    ],
)


@every_layout
def test_groups_are_those_that_parallel_state_builds(layout: ParallelLayout, world_size: int):
    for rank in range(world_size):
        with rank_of_world(rank, world_size):
            initialize(layout)
            built = {kind: group() for kind, group in GROUPS.items()}
            members = {
                kind: tuple(torch.distributed.get_process_group_ranks(group))
                for kind, group in built.items()
                if group is not None
            }
        mine = {
            kind: group
            for kind in GROUPS
            for group in layout.groups(kind, world_size)
            if rank in group
        }
        assert mine == members


@every_layout
def test_coordinates_are_those_that_parallel_state_reports(layout: ParallelLayout, world_size: int):
    for rank in range(world_size):
        with rank_of_world(rank, world_size):
            initialize(layout)
            reported = {axis: rank_on() for axis, rank_on in COORDINATES.items()}
        place = layout.coordinates(rank, world_size)
        assert {axis: getattr(place, axis) for axis in COORDINATES} == reported


def groups_are_refused(layout: ParallelLayout, world_size: int) -> bool:
    with rank_of_world(0, world_size):
        return is_refused(lambda: initialize(layout))


ORDERS = ["-".join(order) for order in itertools.permutations(["tp", "cp", "ep", "dp", "pp"])]
sizes = st.sampled_from([1, 1, 2, 2, 3, 4])


@given(
    sizes=st.fixed_dictionaries(
        {"tp": sizes, "cp": sizes, "pp": sizes, "ep": sizes},
        optional={"etp": sizes, "vpp": st.sampled_from([1, 2])},
    ),
    order=st.sampled_from(ORDERS),
    replicas=st.sampled_from([1, 2, 3, 4]),
    rest=st.sampled_from([0, 0, 0, 1]),
)
@settings(deadline=None, max_examples=400)
def test_groups_that_megatron_refuses_are_those_that_break_a_rule(
    sizes: dict[str, int], order: str, replicas: int, rest: int
):
    layout = layout_of(order=order, **sizes)
    layout = replace(layout, sequence_parallel=layout.tp > 1)
    replica = layout.tp * layout.cp * layout.pp
    world_size = replica * replicas + rest
    # All other numbers are multiples of every size that is drawn.
    model = Model(
        num_layers=24,
        num_attention_heads=12,
        hidden_size=96,
        num_moe_experts=12,
        transformer={"add_bias_linear": False, "attention_dropout": 0.0},
    )
    batch = layout.pp * max(1, world_size // replica)
    data = Data(sequence_length=288, micro_batch_size=1, global_batch_size=batch)
    assert bool(layout.check(model, data, world_size)) == groups_are_refused(layout, world_size)


def test_the_sizes_are_arguments_of_the_installed_megatron():
    known = inspect.signature(parallel_state.initialize_model_parallel).parameters
    assert layout_of(pp=2, vpp=2).model_parallel_sizes().keys() <= known.keys()
