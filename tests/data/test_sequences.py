"""Padding and packing: every token is there once, in its place, and padding counts nowhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from fake_ranks import initialize, rank_of_world
from hypothesis import given
from hypothesis import strategies as st

from mcore_lab.config import Data
from mcore_lab.data.datasets import build_datasets
from mcore_lab.data.sequences import Batch, packed_share, padded_share
from mcore_lab.layout import ParallelLayout

PER_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")
SPLIT = ParallelLayout(
    context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True
)


def samples_of(*samples: list[int]) -> Batch:
    """Return a batch `[b, s]` of samples of documents of these lengths; tokens from 1 on."""
    positions = torch.tensor([[p for n in lengths for p in range(n)] for lengths in samples])
    tokens = torch.arange(1, positions.numel() + 1).view_as(positions)
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones_like(tokens, dtype=torch.float32),
        "position_ids": positions,
    }


def shares_of_ranks(batch: Batch, layout: ParallelLayout, packed: bool) -> list[Batch]:
    """Return what each context-parallel rank has of a batch."""
    world = layout.tp * layout.cp
    shares = []
    for cp in range(layout.cp):
        with rank_of_world(layout.rank_of(world_size=world, cp=cp), world):
            initialize(layout)
            shares.append((packed_share if packed else padded_share)(batch, layout))
    return shares


@pytest.mark.parametrize("length", [8, 9, 13, 16])
def test_padded_ranks_hold_each_token_once_and_padding_has_no_loss(length: int):
    batch = samples_of([length], [length])
    shares = shares_of_ranks(batch, SPLIT, packed=False)
    assert {share["tokens"].shape for share in shares} == {(2, SPLIT.padded(length) // 2)}
    tokens = torch.cat([share["tokens"] for share in shares], 1)
    mask = torch.cat([share["loss_mask"] for share in shares], 1)
    assert sorted(tokens[mask > 0].tolist()) == batch["tokens"].flatten().tolist()
    assert not tokens[mask == 0].any()


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(lengths)
def test_packed_ranks_hold_each_token_once_with_its_label_and_position(documents: list[int]):
    batch = samples_of(documents)
    shares = shares_of_ranks(batch, SPLIT, packed=True)
    rows = {name: torch.cat([share[name][0] for share in shares]) for name in PER_TOKEN}
    text = rows["loss_mask"] > 0
    held = sorted(zip(*(rows[name][text].tolist() for name in PER_TOKEN), strict=True))
    assert held == list(zip(*(batch[name][0].tolist() for name in PER_TOKEN), strict=True))
    assert len(rows["tokens"]) % SPLIT.sequence_multiple == 0
    assert not rows["tokens"][~text].any()


@given(lengths)
def test_documents_end_where_cu_seqlens_say(documents: list[int]):
    (row,) = shares_of_ranks(samples_of(documents), ParallelLayout(), packed=True)
    spans = list(pairwise(row["cu_seqlens"].tolist()))
    assert [end - start for start, end in spans] == documents
    assert row["cu_seqlens_padded"].tolist() == row["cu_seqlens"].tolist()
    for start, end in spans:
        assert row["position_ids"][0, start:end].tolist() == list(range(end - start))


def test_a_sample_begins_a_document_of_its_own():
    (row,) = shares_of_ranks(samples_of([3, 5], [8]), ParallelLayout(), packed=True)
    assert row["cu_seqlens"].tolist() == [0, 3, 8, 16]
    assert row["tokens"].shape == (1, 16)


def test_mock_documents_are_as_long_as_wished_for_and_do_not_predict_each_other():
    data = Data(sequence_length=64, mock_document_length=9, pack_documents=True, num_samples=20)
    sample = build_datasets(data).train[0]
    ends = (sample["tokens"] == 64).nonzero().flatten().tolist()
    assert len(ends) >= 64 / 9 - 1
    assert max(end - start for start, end in pairwise([-1, *ends])) <= 9
    assert sample["loss_mask"][ends].sum() == 0
    assert sample["position_ids"].max() < 9
