"""The sizes of a layout and the grid of its ranks: pure Python, no device and no torch."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from layout_cases import MOE, Data, Model, layout_of

from mcore_lab.errors import LayoutError
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.grid import Coordinates


def test_tp2_with_ep2_runs_on_two_ranks_as_experts_fold_into_the_world():
    layout = layout_of(tp=2, ep=2, etp=1, sp=True)
    assert layout.check(Model(**MOE), Data(), world_size=2) == []
    assert (layout.data_parallel_size(2), layout.expert_data_parallel_size(2)) == (1, 1)


def test_a_world_that_the_layout_does_not_fill_has_no_data_parallel_size():
    with pytest.raises(
        LayoutError, match=r"world size 6, .* = 2 \* 1 \* 2 = 4; use .* 4 or 8 ranks"
    ):
        layout_of(tp=2, pp=2).data_parallel_size(6)
    with pytest.raises(LayoutError, match=r"world size 2, .* = 1 \* 4 \* 1 = 4; use .* 4 ranks"):
        layout_of(ep=4).expert_data_parallel_size(2)
    with pytest.raises(LayoutError, match=r"tp must be at least 1"):
        layout_of(tp=0).data_parallel_size(2)


def test_interleaving_sets_the_messages_that_it_needs():
    interleaved = layout_of(pp=2, vpp=2).transformer_fields()
    assert interleaved["overlap_p2p_comm"] is True
    assert interleaved["batch_p2p_comm"] is False
    assert interleaved["virtual_pipeline_model_parallel_size"] == 2
    assert not {"overlap_p2p_comm", "batch_p2p_comm"} & layout_of(pp=2).transformer_fields().keys()


def test_a_single_chunk_is_no_interleaving():
    layout = layout_of(pp=2, vpp=1)
    assert layout.model_parallel_sizes()["virtual_pipeline_model_parallel_size"] is None
    assert layout.transformer_fields()["virtual_pipeline_model_parallel_size"] is None


KINDS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "dp-cp": ("dp", "cp"),
    "tp-pp": ("tp", "pp"),
    "tp-cp": ("tp", "cp"),
    "tp-dp": ("tp", "dp"),
    "tp-dp-cp": ("tp", "dp", "cp"),
    "ep": ("ep",),
    "etp": ("etp",),
    "edp": ("edp",),
    "etp-ep": ("etp", "ep"),
    "etp-ep-pp": ("etp", "ep", "pp"),
}


@st.composite
def layouts_in_a_world(draw: st.DrawFn) -> tuple[ParallelLayout, int]:
    size = st.integers(1, 3)
    tp, cp, dp, pp, ep, etp = (draw(size) for _ in range(6))
    assume((tp * cp * dp) % (ep * etp) == 0)
    order = "-".join(draw(st.permutations(["tp", "cp", "ep", "dp", "pp"])))
    return layout_of(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, order=order), tp * cp * dp * pp


@given(layouts_in_a_world())
def test_every_rank_has_its_own_coordinates_and_they_lead_back_to_it(
    placed: tuple[ParallelLayout, int],
):
    layout, world = placed
    coordinates = [layout.coordinates(rank, world) for rank in range(world)]
    assert len(set(coordinates)) == world
    assert [
        layout.rank_of(world_size=world, tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp)
        for at in coordinates
    ] == list(range(world))


@given(layouts_in_a_world(), st.sampled_from(sorted(KINDS)))
def test_groups_of_each_kind_cover_every_rank_once(placed: tuple[ParallelLayout, int], kind: str):
    layout, world = placed
    sizes = {
        "dp": layout.data_parallel_size(world),
        "edp": layout.expert_data_parallel_size(world),
    }
    groups = layout.groups(kind, world)
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    size = prod(sizes.get(axis) or getattr(layout, axis) for axis in KINDS[kind])
    assert {len(group) for group in groups} == {size}
    assert all(list(group) == sorted(group) for group in groups)


@given(layouts_in_a_world(), st.sampled_from(["tp", "cp", "dp", "ep", "etp", "edp"]))
def test_ranks_of_a_group_differ_in_its_coordinate_only(
    placed: tuple[ParallelLayout, int], axis: str
):
    layout, world = placed
    same = {"tp", "cp", "dp"} if axis in ("tp", "cp", "dp") else {"ep", "etp", "edp"}
    for group in layout.groups(axis, world):
        places = [layout.coordinates(rank, world) for rank in group]
        assert [getattr(place, axis) for place in places] == list(range(len(group)))
        for other in same - {axis}:
            assert len({getattr(place, other) for place in places}) == 1


def test_the_grid_of_eight_ranks_reads_as_megatron_draws_it():
    layout = layout_of(tp=2, pp=2)
    assert layout.groups("tp", 8) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.groups("dp", 8) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert layout.groups("pp", 8) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert layout.coordinates(5, 8) == Coordinates(tp=1, cp=0, dp=0, pp=1, ep=0, etp=1, edp=0)


def test_only_the_outer_stages_hold_embeddings():
    layout = layout_of(pp=4)
    assert layout.groups("embedding", 8) == [(0, 6), (1, 7)]
    assert layout.groups("position-embedding", 8) == [(0,), (1,)]
    assert layout_of().groups("embedding", 2) == [(0,), (1,)]


def test_what_is_not_in_the_grid_is_refused():
    layout = layout_of(tp=2)
    with pytest.raises(LayoutError, match=r"rank 4 is not one of 0 to 3"):
        layout.coordinates(4, 4)
    with pytest.raises(LayoutError, match=r"tp 2 is not one of 0 to 1"):
        layout.rank_of(world_size=4, tp=2)
    with pytest.raises(LayoutError, match=r"no groups of kind 'eep'; did you mean ep"):
        layout.groups("eep", 4)
    with pytest.raises(LayoutError, match=r"order 'tp-pp' must name each"):
        layout_of(order="tp-pp").groups("tp", 4)
