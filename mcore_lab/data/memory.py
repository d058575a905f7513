"""The sequence-memory task: a few random sequences, to be learnt by heart."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from mcore_lab.data.sequences import Batch

_SEED = 42


class SequenceMemory(Dataset[Batch]):
    """Fixed random sequences, in which each token is its own label.

    Nothing is to be found out from other tokens: what a model learns is the vocabulary, which has
    no order, so that its loss comes down to nothing, and its curve shows what a layout changes.
    """

    def __init__(self, sequences: int, length: int, vocab_size: int) -> None:
        draw = torch.Generator().manual_seed(_SEED)
        self._sequences = torch.randint(vocab_size, (sequences, length), generator=draw)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Batch:
        tokens = self._sequences[index]
        return {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(len(tokens)),
            "position_ids": torch.arange(len(tokens)),
        }
