"""UTF-8 text, tokenised once and kept in Megatron-Core's indexed format."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from mcore_lab.data.files import text_files
from mcore_lab.errors import DataError
from mcore_lab.runtime.together import fail_together

if TYPE_CHECKING:
    from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

_LONGEST, _SHORTEST, _AT_LEAST = 4096, 256, 100


def tokenised_text(path: Path, cache: Path, tokenizer: MegatronTokenizerBase) -> Path:
    """Return the prefix of the indexed dataset of the text at `path`; write it if it is not there.

    It is named after the text's contents, so that changed text is tokenised anew. Rank 0 of each
    machine writes, beside, and publishes with one rename; the others wait for it.
    Raises DataError, on every rank, where a file is not UTF-8 text or `cache` cannot be written.
    """
    with fail_together():
        files = text_files(path)
        folder = cache / f"text-{_digest(files)}"
        if not folder.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                _publish(files, folder, tokenizer)
            except OSError as error:
                raise cannot_write(cache, error) from error
    return folder / "text"


def cannot_write(cache: Path, error: OSError) -> DataError:
    """Return what to tell a person whose cache folder cannot be written."""
    return DataError(
        f"cannot keep the tokenised text in {cache}: {error.strerror or error}; "
        "--data.cache-dir names another folder"
    )


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256(f"{_LONGEST} {_SHORTEST} {_AT_LEAST}".encode())
    for file in files:
        content = _read(file)
        digest.update(f"\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _publish(files: list[Path], folder: Path, tokenizer: MegatronTokenizerBase) -> None:
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        _write(files, str(unfinished / "text"), tokenizer)
        unfinished.rename(folder)
    except OSError:
        # Another run may have published the same text meanwhile.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(files: list[Path], prefix: str, tokenizer: MegatronTokenizerBase) -> None:
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=dtype)
    size = _document_size(sum(file.stat().st_size for file in files))
    for file in files:
        for document in _documents(file, size):
            ids = [*tokenizer.tokenize(document), tokenizer.eod]
            builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(get_idx_path(prefix))


def _document_size(total: int) -> int:
    """Return how long a document is, in characters, in a text of `total` bytes.

    The split into training and validation is by document: there must be enough of them.
    """
    return min(_LONGEST, max(_SHORTEST, total // _AT_LEAST))


def _documents(file: Path, size: int) -> Iterator[str]:
    """Cut a file into documents of up to `size` characters, at line ends where there are any."""
    try:
        text = _read(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
