"""Samples are drawn by global index: step k is the same on every layout, in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from on_ranks import on_ranks
from torch.utils.data import Dataset

from mcore_lab.data.batches import GlobalBatches

SAMPLES = 50
BATCH = 8


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """A dataset whose samples are their own index, and -1 in the place of one that is missing."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor(-1 if index is None else index)}


def batches(*, micro: int = 2, rank: int = 0, ranks: int = 1, **kwargs: Any) -> GlobalBatches:
    return GlobalBatches(
        Numbers(),
        micro_batch_size=micro,
        global_batch_size=BATCH,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **{"seed": 1234, **kwargs},
    )


def order(count: int, **kwargs: Any) -> list[int | None]:
    drawn = batches(**kwargs)
    return [drawn.sample_index(position) for position in range(count)]


def taken(step: int, micro: int, ranks: int) -> list[int]:
    """Return the samples that all data-parallel ranks together take in a step."""
    samples = []
    for rank in range(ranks):
        drawn = batches(micro=micro, rank=rank, ranks=ranks)
        parts = [part["tokens"].tolist() for part in drawn.after(step * BATCH)]
        assert len(parts) == drawn.num_microbatches == BATCH // (micro * ranks)
        assert all(len(part) == micro for part in parts)
        samples += [sample for part in parts for sample in part]
    return samples


@on_ranks(1)
def test_step_k_takes_the_same_samples_for_every_number_of_ranks_and_micro_batch() -> None:
    whole = order(20 * BATCH)
    for micro, ranks in [(8, 1), (1, 1), (2, 1), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8)]:
        for step in (0, 1, 6, 19):
            expected = whole[step * BATCH : (step + 1) * BATCH]
            assert sorted(taken(step, micro, ranks)) == sorted(expected), (micro, ranks, step)


@on_ranks(1)
def test_a_step_is_the_same_in_whatever_order_steps_are_asked_for() -> None:
    drawn = batches()

    def tokens(step: int) -> list[list[int]]:
        return [part["tokens"].tolist() for part in drawn.after(step * BATCH)]

    forward = [tokens(step) for step in range(20)]
    assert [tokens(step) for step in reversed(range(20))] == forward[::-1]


def test_each_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    whole = order(3 * SAMPLES)
    epochs = [whole[start : start + SAMPLES] for start in range(0, 3 * SAMPLES, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    count = 2 * SAMPLES
    assert order(count, seed=1) == order(count, seed=1, micro=4, rank=1, ranks=2)
    assert order(count, seed=1) != order(count, seed=2)
    np.random.seed(3)
    torch.manual_seed(3)
    assert order(count, seed=1) == order(count, seed=1)


def test_the_order_is_what_it_was_when_this_test_was_written() -> None:
    """A run that goes on after an upgrade, of numpy too, goes on with the same data."""
    assert order(6) == [38, 32, 48, 10, 34, 12]


@on_ranks(1)
def test_after_the_last_sample_batches_are_filled_up_with_missing_ones() -> None:
    drawn = batches(num_samples=5)
    tokens = [sample for part in drawn.after(0) for sample in part["tokens"].tolist()]
    assert tokens == [*order(5), -1, -1, -1]


@pytest.mark.parametrize("draw", [lambda: order(1), lambda: order(1, num_samples=1)])
def test_the_first_sample_is_there_with_and_without_a_last(draw: Callable[[], list[Any]]) -> None:
    assert draw() == [order(1)[0]]
