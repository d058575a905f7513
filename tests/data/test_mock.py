"""Megatron-Core's mock data: the same on every supported version."""

from __future__ import annotations

import torch

from mcore_lab.config import Data
from mcore_lab.data.datasets import build_datasets

EOD = 64


def test_tokens_count_up_to_the_end_of_a_document_and_begin_again() -> None:
    train = build_datasets(Data(sequence_length=64, num_samples=200)).train
    seen = set()
    for sample in train:
        tokens, labels = sample["tokens"], sample["labels"]
        assert tokens.shape == labels.shape == sample["position_ids"].shape == (64,)
        assert torch.equal(tokens[1:], labels[:-1])
        seen |= set(tokens.tolist())
        inside = (tokens != EOD) & (labels != EOD)
        assert torch.equal(labels[inside], (tokens[inside] + 1) % (EOD + 1))
        assert bool(sample["loss_mask"].all())
    assert seen == set(range(EOD + 1))


def test_the_vocabulary_is_the_tokens_and_the_end_of_a_document() -> None:
    assert build_datasets(Data(mock_vocab_size=9)).vocab_size == 10


def test_there_are_as_many_samples_as_were_asked_for() -> None:
    assert len(build_datasets(Data(num_samples=7)).train) == 7


def test_the_samples_are_the_same_on_every_version() -> None:
    train = build_datasets(Data(sequence_length=64)).train
    assert [train[index]["tokens"][::16].tolist() for index in range(3)] == [
        [61, 12, 28, 44],
        [35, 51, 2, 18],
        [51, 2, 18, 34],
    ]


def test_mock_data_has_no_validation_split() -> None:
    assert build_datasets(Data()).valid is None
