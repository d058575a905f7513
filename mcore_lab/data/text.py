"""UTF-8 text, tokenised once and kept in Megatron-Core's indexed format."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from mcore_lab.data.files import text_files
from mcore_lab.errors import DataError

if TYPE_CHECKING:
    from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

_PIECE_BYTES = 4096


def tokenised_text(path: Path, cache: Path, tokenizer: MegatronTokenizerBase) -> Path:
    """Return the prefix of the indexed dataset of the text at `path`; write it if it is not there.

    It is named after the text's contents, so that changed text is tokenised anew. Rank 0 of each
    machine writes, beside, and publishes with one rename; the others wait for it.
    Raises DataError where a file is not UTF-8 text.
    """
    files = text_files(path)
    folder = cache / f"text-{_digest(files)}"
    if not folder.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        _write(files, folder, tokenizer)
    if dist.is_initialized():
        dist.barrier()
    return folder / "text"


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _write(files: list[Path], folder: Path, tokenizer: MegatronTokenizerBase) -> None:
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        prefix = str(unfinished / "text")
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=dtype)
        for file in files:
            for piece in _pieces(file):
                ids = tokenizer.tokenize(piece)
                builder.add_document(torch.tensor([*ids, tokenizer.eod]), [len(ids) + 1])
        builder.finalize(get_idx_path(prefix))
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _pieces(file: Path) -> Iterator[str]:
    """Cut a file at line ends into documents of a few kilobytes.

    Splits are by document: one large file would otherwise be all training and no validation.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _PIECE_BYTES:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
