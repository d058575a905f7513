"""A rank that another has left, or lets wait, says in a line what it was in."""

from __future__ import annotations

import pickle
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mcore_lab.errors import LostPeerError
from mcore_lab.runtime import launch, process_group
from mcore_lab.runtime.waiting import waited_in_vain


def wait_for_rank_1(lines: Path) -> None:
    with process_group():
        # A pair that has waited in vain has closed its connection: one for each.
        limit = timedelta(seconds=2)
        pairs = [dist.new_group([0, 1], timeout=limit, group_desc=f"PAIR_{n}") for n in range(3)]
        numbers = torch.ones(4)
        dist.barrier()
        if dist.get_rank() == 1:
            # Until the launcher ends it, as it does when the other has failed.
            time.sleep(60)
        works = [dist.all_reduce(numbers, group=pairs[0], async_op=True)]
        with lines.open("w") as file:
            for wait in (works[0].wait, lambda: dist.all_reduce(numbers, group=pairs[1])):
                try:
                    wait()
                except RuntimeError as error:
                    file.write(f"{waited_in_vain(error, 0, 1)}\n")
        dist.recv(numbers, src=1, group=pairs[2])


def test_a_rank_that_waits_too_long_names_the_operation_the_group_and_the_seconds(
    tmp_path: Path,
) -> None:
    with pytest.raises(LostPeerError) as caught:
        launch(wait_for_rank_1, 2, tmp_path / "lines", timeout=60, megatron_core=False)
    told = [*(tmp_path / "lines").read_text().splitlines(), *str(caught.value).splitlines()]
    assert [line.partition(" waited ")[2].partition(" for a rank")[0] for line in told] == [
        f"2 s in wait_for_rank_1 ({__name__})",
        f"2 s in all_reduce of <lambda> ({__name__}), group PAIR_1 of ranks 0, 1",
        f"2 s in recv of wait_for_rank_1 ({__name__}), group PAIR_2 of ranks 0, 1",
    ]


def test_the_error_is_the_same_when_another_process_has_read_it() -> None:
    again = pickle.loads(pickle.dumps(LostPeerError("rank 0 waited", timed_out=True)))
    assert (str(again), again.timed_out, again.exit_code) == ("rank 0 waited", True, 1)
