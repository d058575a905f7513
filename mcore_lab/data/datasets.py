"""Megatron-Core's GPT datasets: mock data, or text through its byte-level tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from mcore_lab.compat import byte_level_tokenizer, null_tokenizer
from mcore_lab.config import Data
from mcore_lab.data.text import tokenised_text
from mcore_lab.errors import DataError

if TYPE_CHECKING:
    from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

_DATASET_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a run trains on and is validated on."""

    train: GPTDataset
    valid: GPTDataset | None
    vocab_size: int
    """Tokens that the data can hold."""


def build_datasets(data: Data) -> Datasets:
    """Build the datasets that `data` describes; every rank calls this, and rank 0 builds first.

    Raises DataError where there is no text, or too little of it for one sample.
    """
    if data.path is None:
        tokenizer = null_tokenizer(data.mock_vocab_size)
        config = _config(data, tokenizer)
        train = _build(MockGPTDataset, [data.num_samples, None, None], config)[0]
        return Datasets(train=train, valid=None, vocab_size=tokenizer.vocab_size)
    tokenizer = byte_level_tokenizer()
    prefix = tokenised_text(Path(data.path), Path(data.cache_dir), tokenizer)
    config = _config(data, tokenizer, prefix)
    train, valid, _ = _build(GPTDataset, [None, None, None], config)
    if not train:
        raise DataError(
            f"{data.path}: the training share of --data.split {data.split} holds less than one "
            f"sample of {data.sequence_length} tokens; more text, or a shorter --data.sequence-length"
        )
    return Datasets(train=train, valid=valid or None, vocab_size=tokenizer.vocab_size)


def _config(
    data: Data, tokenizer: MegatronTokenizerBase, prefix: Path | None = None
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=_DATASET_SEED,
        sequence_length=data.sequence_length,
        blend=([str(prefix)], None) if prefix else None,
        split=data.split if prefix else "1",
        path_to_cache=str(prefix.parent / "indices") if prefix else None,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        # The layers mask by position themselves.
        create_attention_mask=False,
    )


def _build(
    kind: type[GPTDataset], sizes: list[int | None], config: GPTDatasetConfig
) -> list[GPTDataset]:
    # Each rank reads for itself, so that no rank's samples depend on the layout.
    return BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()
