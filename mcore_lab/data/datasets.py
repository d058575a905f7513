"""What a recipe's data describes: Megatron-Core's GPT datasets, mock or text, or a memory task."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    MockGPTLowLevelDataset,
)
from torch.utils.data import Dataset, Subset

from mcore_lab.compat import byte_level_tokenizer, null_tokenizer
from mcore_lab.config import Data
from mcore_lab.data.memory import SequenceMemory
from mcore_lab.data.text import cannot_write, tokenised_text
from mcore_lab.errors import DataError
from mcore_lab.runtime.together import fail_together

if TYPE_CHECKING:
    from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

_DATASET_SEED = 0
_INDICES = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a run trains on and is validated on."""

    train: Dataset[Any]
    valid: Dataset[Any] | None
    vocab_size: int
    """Tokens that the data can hold."""


def build_datasets(data: Data) -> Datasets:
    """Build the datasets that `data` describes; every rank calls this, and rank 0 builds first.

    Raises DataError where there is no text, or too little of it for one sample.
    """
    if data.path is not None:
        return _text_data(data, Path(data.path))
    return _mock_data(data) if data.memory_sequences is None else _sequences_to_memorise(data)


def _mock_data(data: Data) -> Datasets:
    tokenizer = null_tokenizer(data.mock_vocab_size)
    config = _config(data, tokenizer, split="1")
    train = _build(_mock_documents(data), [data.num_samples, None, None], config)[0]
    # Megatron-Core builds whole epochs of its mock documents, which hold more samples than these.
    samples = Subset(train, range(data.num_samples))
    return Datasets(train=samples, valid=None, vocab_size=tokenizer.vocab_size)


def _sequences_to_memorise(data: Data) -> Datasets:
    vocab_size = data.mock_vocab_size + 1
    assert data.memory_sequences is not None
    train = SequenceMemory(data.memory_sequences, data.sequence_length, vocab_size)
    return Datasets(train=train, valid=None, vocab_size=vocab_size)


def _mock_documents(data: Data) -> type[MockGPTDataset]:
    """Return Megatron-Core's mock dataset, of documents up to the length that is wished for."""
    if data.mock_document_length is None:
        return MockGPTDataset
    longest = data.mock_document_length

    class Documents(MockGPTLowLevelDataset):
        max_sequence_length = longest + 1

    class MockDocuments(MockGPTDataset):
        @staticmethod
        def build_low_level_dataset(
            dataset_path: str, config: GPTDatasetConfig
        ) -> MockGPTLowLevelDataset:
            return Documents(config.tokenizer)

    return MockDocuments


def _text_data(data: Data, path: Path) -> Datasets:
    tokenizer, cache = byte_level_tokenizer(), Path(data.cache_dir)
    prefix = tokenised_text(path, cache, tokenizer)
    with _index_folder(cache) as indices:
        blend = ([str(prefix)], None)
        config = _config(data, tokenizer, split=data.split, blend=blend, path_to_cache=str(indices))
        train, valid, test = _build(GPTDataset, [None, None, None], config)
        for dataset in (train, valid, test):
            _hold_indices(dataset)
    _require_samples("training", train, data)
    if config.split_matrix[1] is not None:
        _require_samples("validation", valid, data)
    return Datasets(train=train, valid=valid, vocab_size=tokenizer.vocab_size)


def _require_samples(share: str, dataset: GPTDataset | None, data: Data) -> None:
    if not dataset:
        raise DataError(
            f"{data.path}: the {share} share of --data.split {data.split} holds less than one "
            f"sample of {data.sequence_length} tokens: more text, a shorter "
            "--data.sequence-length, or another --data.split (100,0,0 does without validation)"
        )


def _config(data: Data, tokenizer: MegatronTokenizerBase, **kwargs: Any) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=_DATASET_SEED,
        sequence_length=data.sequence_length,
        tokenizer=tokenizer,
        # Packed documents start at position 0 each, and do not predict the next one's first token.
        reset_position_ids=data.pack_documents,
        reset_attention_mask=data.pack_documents,
        eod_mask_loss=data.pack_documents,
        # The layers mask by position themselves.
        create_attention_mask=False,
        **kwargs,
    )


@contextmanager
def _index_folder(cache: Path) -> Iterator[Path]:
    """Give Megatron-Core a folder of this run's own for the indices that it builds.

    It would take a half-written index that it finds, of a run that was killed or of one that has
    just begun, for a whole one.
    """
    name = [uuid.uuid4().hex]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    folder = cache / f".indices-{name[0]}"
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    with fail_together():
        if is_first:
            _make(folder)
    try:
        yield folder
        if dist.is_initialized():
            dist.barrier()
    finally:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(folder.parent, error) from error


def _build(kind: type[GPTDataset], sizes: list[int | None], config: GPTDatasetConfig) -> list[Any]:
    # Each rank reads for itself, so that no rank's samples depend on the layout.
    return BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()


def _hold_indices(dataset: GPTDataset | None) -> None:
    """Read into memory the indices that Megatron-Core maps from their files."""
    for name in _INDICES if dataset else ():
        setattr(dataset, name, np.array(getattr(dataset, name)))
