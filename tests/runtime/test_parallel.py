"""`process_group` and `model_parallel`: what they set up, take down, and refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from mcore_lab.errors import LayoutError
from mcore_lab.layout import ParallelLayout
from mcore_lab.runtime import launch, model_parallel, process_group

SECONDS = 60.0


def _sizes() -> dict[str, int]:
    from megatron.core import parallel_state as state

    return {
        "tp": state.get_tensor_model_parallel_world_size(),
        "pp": state.get_pipeline_model_parallel_world_size(),
        "cp": state.get_context_parallel_world_size(),
        "ep": state.get_expert_model_parallel_world_size(),
        "etp": state.get_expert_tensor_parallel_world_size(),
        "dp": state.get_data_parallel_world_size(),
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "cp": 1, "ep": 1, "etp": 2, "dp": 1}),
        ({"cp": 2}, {"tp": 1, "pp": 1, "cp": 2, "ep": 1, "etp": 1, "dp": 2}),
        ({"tp": 2, "ep": 4, "etp": 1}, {"tp": 2, "pp": 1, "cp": 1, "ep": 4, "etp": 1, "dp": 2}),
    ],
    ids=str,
)
def test_megatron_core_gets_the_layouts_sizes(
    sizes: dict[str, int], expected: dict[str, int]
) -> None:
    def enter() -> dict[str, int]:
        with model_parallel(ParallelLayout().resized(**sizes)) as world:
            assert (world.size, world.rank) == (4, dist.get_rank())
            assert world.is_first == (world.rank == 0)
            return _sizes()

    assert launch(enter, 4, timeout=SECONDS) == [expected] * 4


def test_it_is_taken_down_and_can_be_entered_again_with_another_layout() -> None:
    def enter_twice() -> list[int]:
        from megatron.core import parallel_state

        found = []
        for tp in (2, 1):
            with model_parallel(ParallelLayout().resized(tp=tp)):
                found.append(_sizes()["tp"])
            assert not dist.is_initialized()
            assert not parallel_state.model_parallel_is_initialized()
        return found

    assert launch(enter_twice, 2, timeout=SECONDS) == [[2, 1], [2, 1]]


def test_ranks_are_seeded_as_megatron_core_does() -> None:
    def draw(seed: int) -> tuple[list[float], list[float]]:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with model_parallel(ParallelLayout().resized(tp=2), seed=seed):
            with get_cuda_rng_tracker().fork():
                on_device = torch.rand(4, device="cuda").tolist()
            return torch.rand(4).tolist(), on_device

    (first, first_own), (second, second_own) = launch(draw, 2, 7, timeout=SECONDS)
    assert first == second
    assert first_own != second_own
    assert launch(draw, 2, 7, timeout=SECONDS)[0] == (first, first_own)
    assert launch(draw, 2, 8, timeout=SECONDS)[0] != (first, first_own)


def test_a_world_that_does_not_fit_the_layout_is_refused_before_the_groups_are_built() -> None:
    def enter() -> None:
        with model_parallel(ParallelLayout().resized(tp=2)):
            raise AssertionError("the layout needs an even number of ranks")

    with pytest.raises(LayoutError) as raised:
        launch(enter, 3, timeout=SECONDS)
    assert "3" in str(raised.value)


ALONE = """
import os
import torch
import torch.distributed as dist
from mcore_lab.layout import ParallelLayout
from mcore_lab.runtime import model_parallel, process_group
for _ in range(2):
    with model_parallel(ParallelLayout()) as world:
        x = torch.ones(2, device="cuda")
        dist.all_reduce(x)
        assert x.tolist() == [1, 1]
        print(world.rank, world.size, world.local_size, world.device.communication)
try:
    with process_group():
        raise ValueError("in the group")
except ValueError:
    assert not dist.is_initialized()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what one rank does without a GPU")
def test_one_rank_needs_no_launcher_and_may_come_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["0 1 1 gloo"] * 2


def test_every_rank_knows_where_it_stands() -> None:
    def where() -> tuple[int, int, int, int, str]:
        with process_group() as world:
            device = world.device.type
            return world.rank, world.size, world.local_rank, world.local_size, device

    expected = [(rank, 3, rank, 3, "cpu") for rank in range(3)]
    assert launch(where, 3, timeout=SECONDS) == expected
