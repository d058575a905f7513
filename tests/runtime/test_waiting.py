"""A rank that another has left, or lets wait, says in a line what it was in."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
import torch.distributed as dist

from mcore_lab.errors import LostPeerError
from mcore_lab.runtime import launch, process_group


def wait_for_rank_1(what: str) -> None:
    with process_group(timeout_seconds=1):
        pair = dist.new_group([0, 1], group_desc="A_PAIR")
        numbers = torch.ones(4)
        dist.barrier()
        if dist.get_rank() == 1:
            # Until torch's launcher ends it, as it does when the other has failed.
            time.sleep(60)
        if what == "all_reduce":
            dist.all_reduce(numbers, group=pair)
        elif what == "recv":
            dist.recv(numbers, src=1)
        else:
            work = dist.all_reduce(numbers, group=pair, async_op=True)
            work.wait()


HERE = f"wait_for_rank_1 ({__name__})"


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "all_reduce": f"all_reduce of {HERE}, group A_PAIR of ranks 0, 1",
        "recv": f"recv of {HERE}, ",
        "work": f"{HERE}, group A_PAIR of ranks 0, 1",
    }.items(),
)
def test_a_rank_that_waits_too_long_names_the_operation_the_group_and_the_seconds(
    what: str, words: str
) -> None:
    with pytest.raises(LostPeerError) as caught:
        launch(wait_for_rank_1, 2, what, timeout=30, megatron_core=False)
    said = str(caught.value)
    assert said.startswith("rank 0 on ") and f" waited 1 s in {words}" in said
    assert "\n" not in said


def test_the_error_is_the_same_when_another_process_has_read_it() -> None:
    again = pickle.loads(pickle.dumps(LostPeerError("rank 0 waited", timed_out=True)))
    assert (str(again), again.timed_out, again.exit_code) == ("rank 0 waited", True, 1)
