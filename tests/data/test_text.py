"""Text: tokenised once, byte by byte, and read back as it was."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from on_ranks import on_ranks

from mcore_lab.compat import byte_level_tokenizer
from mcore_lab.config import Data, Model, Recipe
from mcore_lab.data.datasets import Datasets, build_datasets
from mcore_lab.data.text import tokenised_text
from mcore_lab.errors import ConfigError, DataError, RankFailedError
from mcore_lab.model import model_vocab_size
from mcore_lab.runtime import launch, process_group

EOD = 0
LINES = "".join(f"line {number}: äöü €, naïve, 数学\n" for number in range(2000))


def data(folder: Path, **values: Any) -> Data:
    kwargs: dict[str, Any] = {"path": str(folder / "text"), "cache_dir": str(folder / "cache")}
    return Data(**{"sequence_length": 32, **kwargs, **values})


def write(folder: Path, text: str | bytes, name: str = "text") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def tokenised(folder: Path, path: str = "text") -> Path:
    return tokenised_text(folder / path, folder / "cache", byte_level_tokenizer())


def documents(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(str(prefix))
    found = [bytes(dataset[index].tolist()) for index in range(len(dataset))]
    assert all(document.endswith(b"\0") for document in found)
    return [document[:-1] for document in found]


def in_text_order(train: Any) -> bytes:
    """Return the tokens of all samples, in the order before they were shuffled."""
    samples = [train[int(place)]["tokens"].tolist() for place in np.argsort(train.shuffle_index)]
    return bytes(token for sample in samples for token in sample)


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*"))


# What is written is the text.


ODD = {
    "utf-8": LINES,
    "carriage returns": "one\r\ntwo\rthree\n" * 200,
    "control characters": "".join(map(chr, range(32))) * 50,
    "zero bytes": "a\0b\0\0c\n" * 200,
    "one long line": "no line end " * 2000,
    "no last line end": LINES + "the end",
    "byte order mark": "\ufeff" + LINES,
}


@pytest.mark.parametrize("text", ODD.values(), ids=list(ODD))
def test_the_documents_put_together_are_the_file(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    assert b"".join(documents(tokenised(tmp_path))) == text.encode()


@pytest.mark.parametrize("text", ODD.values(), ids=list(ODD))
def test_the_samples_put_together_are_the_documents(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    train: Any = build_datasets(data(tmp_path, split="100,0,0")).train
    written = documents(tokenised(tmp_path))
    whole = b"".join(written[index] + b"\0" for index in train.document_index)
    read = in_text_order(train)
    assert whole.startswith(read)
    assert len(whole) - len(read) <= 32


@pytest.mark.parametrize("text", ODD.values(), ids=list(ODD))
def test_every_byte_counts_in_the_loss_and_is_the_label_of_the_one_before(
    tmp_path: Path, text: str
) -> None:
    write(tmp_path, text)
    train: Any = build_datasets(data(tmp_path, split="100,0,0")).train
    for sample in train:
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert bool(sample["loss_mask"].all())


def test_a_folder_is_its_files_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, "the second\n", "folder/b.txt")
    write(tmp_path, "the first\n", "folder/a.md")
    write(tmp_path, "", "folder/empty.py")
    assert documents(tokenised(tmp_path, "folder")) == [b"the first\n", b"the second\n"]


def test_documents_are_short_enough_for_a_validation_split_of_a_short_text(tmp_path: Path) -> None:
    write(tmp_path, LINES[:20_000])
    sizes = [len(document) for document in documents(tokenised(tmp_path))]
    assert len(sizes) > 50 and max(sizes) < 1100
    built = build_datasets(data(tmp_path))
    assert built.valid is not None and len(built.valid) >= 10


def test_documents_end_at_line_ends(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    assert all(document.endswith(b"\n") for document in documents(tokenised(tmp_path)))


# Training and validation.


def test_the_validation_split_holds_text_that_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    built: Datasets = build_datasets(data(tmp_path, split="80,20,0"))
    train: Any = built.train
    valid: Any = built.valid
    assert not set(train.document_index) & set(valid.document_index)
    assert len(train) / len(valid) == pytest.approx(4, rel=0.1)


def test_a_split_without_validation_has_none(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    assert build_datasets(data(tmp_path, split="100,0,0")).valid is None


def test_the_samples_are_the_same_in_another_cache(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    one: Any = build_datasets(data(tmp_path)).train
    other: Any = build_datasets(data(tmp_path, cache_dir=str(tmp_path / "other"))).train
    assert in_text_order(one) == in_text_order(other)
    assert one[0]["tokens"].tolist() == other[0]["tokens"].tolist()


# Written once, whole, and anew when the text changes.


def test_text_is_tokenised_once(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    prefix = tokenised(tmp_path)
    written = prefix.with_suffix(".bin").stat().st_mtime_ns
    build_datasets(data(tmp_path))
    build_datasets(data(tmp_path, sequence_length=64))
    assert prefix.with_suffix(".bin").stat().st_mtime_ns == written
    assert cached(tmp_path) == [prefix.parent.name]


def test_changed_text_is_tokenised_anew(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    before = tokenised(tmp_path)
    write(tmp_path, LINES.replace("line 7:", "LINE 7:"))
    after = tokenised(tmp_path)
    assert before != after
    assert b"LINE 7:" in b"".join(documents(after))
    assert b"LINE 7:" not in b"".join(documents(before))


def test_text_moved_from_one_file_to_the_next_is_another_text(tmp_path: Path) -> None:
    write(tmp_path, "ab", "one/a.txt")
    write(tmp_path, "c", "one/b.txt")
    write(tmp_path, "a", "two/a.txt")
    write(tmp_path, "bc", "two/b.txt")
    assert tokenised(tmp_path, "one") != tokenised(tmp_path, "two")


def test_two_ranks_read_what_one_of_them_wrote(tmp_path: Path) -> None:
    write(tmp_path, LINES)

    def read() -> tuple[bytes, bytes]:
        with process_group():
            built: Any = build_datasets(data(tmp_path))
            return in_text_order(built.train), in_text_order(built.valid)

    one, other = launch(read, 2, timeout=60)
    assert one == other
    assert cached(tmp_path) == [tokenised(tmp_path).parent.name]


def test_a_writer_that_is_killed_leaves_nothing_that_could_be_taken_for_the_text(
    tmp_path: Path,
) -> None:
    write(tmp_path, LINES)

    def die_half_way() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith(".idx"):
                os.kill(os.getpid(), signal.SIGKILL)

        with process_group():
            sys.addaudithook(hook)
            tokenised(tmp_path)

    with pytest.raises(RankFailedError, match="rank 0 was killed by SIGKILL"):
        launch(die_half_way, 2, timeout=60)
    assert any((tmp_path / "cache").rglob("*.bin"))
    assert not list((tmp_path / "cache").glob("text-*"))
    assert b"".join(documents(tokenised(tmp_path))) == LINES.encode()


def test_a_run_that_is_killed_while_indices_are_built_leaves_none_to_be_read(
    tmp_path: Path,
) -> None:
    write(tmp_path, LINES)

    def die_half_way() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith("train-shuffle_index.npy"):
                os.kill(os.getpid(), signal.SIGKILL)

        with process_group():
            sys.addaudithook(hook)
            build_datasets(data(tmp_path))

    with pytest.raises(RankFailedError, match="rank 0 was killed by SIGKILL"):
        launch(die_half_way, 2, timeout=60)
    assert list((tmp_path / "cache").rglob("*train-sample_index.npy"))
    train: Any = build_datasets(data(tmp_path)).train
    assert len(in_text_order(train)) == len(train) * 32


def test_two_runs_that_write_the_same_text_at_once_both_have_it(tmp_path: Path) -> None:
    texts = [f"{number} {LINES}" for number in range(8)]
    for number, text in enumerate(texts):
        write(tmp_path, text, f"text{number}")

    def write_all() -> list[bytes]:
        os.environ["LOCAL_RANK"] = "0"
        paths = [tokenised(tmp_path, f"text{number}") for number in range(8)]
        return [b"".join(documents(path)) for path in paths]

    for read in launch(write_all, 2, timeout=60):
        assert read == [text.encode() for text in texts]
    assert len(list((tmp_path / "cache").iterdir())) == 8


# What cannot be used is said, on every rank.


def on_two_ranks(used: Data) -> str:
    """Return what both ranks say of the data."""

    def build() -> str:
        with process_group(), pytest.raises(DataError) as raised:
            build_datasets(used)
        return str(raised.value)

    one, other = launch(build, 2, timeout=60)
    assert one == other
    assert "\n" not in one
    return one


def test_text_that_is_not_utf8_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    write(tmp_path, b"good\n" * 10 + b"\xff bad")
    message = on_two_ranks(data(tmp_path))
    assert message == f"{tmp_path}/text is not UTF-8 text: invalid start byte at byte 50"
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "split", "share"),
    [("short", "100,0,0", "training"), (LINES[:300], "95,5,0", "validation")],
    ids=["shorter than a sample", "no document left for validation"],
)
def test_too_little_text_for_a_sample_is_refused(
    tmp_path: Path, text: str, split: str, share: str
) -> None:
    write(tmp_path, text)
    message = on_two_ranks(data(tmp_path, split=split))
    assert message.startswith(f"{tmp_path}/text: the {share}")
    assert f"--data.split {split} holds less than one sample of 32 tokens" in message


def test_text_of_just_one_sample_is_enough(tmp_path: Path) -> None:
    write(tmp_path, "x" * 32)
    assert len(build_datasets(data(tmp_path, split="100,0,0")).train) == 1  # type: ignore[arg-type]
    write(tmp_path, "x" * 31)
    with pytest.raises(DataError, match="less than one sample"):
        build_datasets(data(tmp_path, split="100,0,0"))


def test_a_cache_that_cannot_be_written_is_refused_with_the_setting(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    write(tmp_path, "in the way", "cache")
    message = on_two_ranks(data(tmp_path))
    assert message.startswith(f"cannot keep the tokenised text in {tmp_path}/cache: ")
    assert "--data.cache-dir names another folder" in message
    assert (tmp_path / "cache").read_text() == "in the way"


@on_ranks(1)
def test_a_model_with_fewer_rows_than_the_text_has_tokens_is_refused(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    tokens = build_datasets(data(tmp_path)).vocab_size
    assert tokens == 256
    recipe = Recipe(name="text_gpt", model=Model(vocab_size=255))
    with pytest.raises(
        ConfigError, match=r"256 rows, but the model has 255: --model.vocab-size 256"
    ):
        model_vocab_size(recipe, tokens)
    assert model_vocab_size(Recipe(name="text_gpt", model=Model(vocab_size=256)), tokens) == 256
