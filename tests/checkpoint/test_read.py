"""What lies in the shards is read as torch reads it, by each rank alone, and nothing runs by it."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SMALL, changed, run
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mcore_lab.checkpoint.contents import Chunk, Place, Tensor, contents_of
from mcore_lab.checkpoint.manifest import MANIFEST
from mcore_lab.checkpoint.read import Shards, read
from mcore_lab.checkpoint.trust import makings_of_tensor, plain_value
from mcore_lab.config import RunArguments
from mcore_lab.errors import CheckpointError
from mcore_lab.recipes.start import run_rank
from mcore_lab.runtime import launch

FILE = "__0_0.distcp"


def torch_saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def place_of(folder: Path, stored: bytes) -> Place:
    """Add what torch.save has written to a shard, and return where it is."""
    with (folder / FILE).open("ab") as file:
        start = file.tell()
        file.write(stored)
    return Place(FILE, start, len(stored))


def chunk_of(folder: Path, tensor: torch.Tensor) -> Chunk:
    shape = tuple(tensor.shape)
    return Chunk((0,) * len(shape), shape, place_of(folder, torch_saved(tensor)))


# Tensors.

NUMBERS = torch.arange(24, dtype=torch.float32).view(2, 3, 4) - 7.25
PLAIN: dict[str, torch.Tensor] = {
    "whole": NUMBERS,
    "transposed": NUMBERS.transpose(0, 2),
    "of a larger storage": NUMBERS[1, 1:],
    "of one number": torch.tensor(3.5),
    "of none": torch.empty(0, 4),
    "repeated": torch.ones(1, 3).expand(2, 3),
    **{
        str(dtype): NUMBERS.to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
    },
    **{str(dtype): (NUMBERS > 0).to(dtype) for dtype in (torch.uint8, torch.bool)},
}
OTHERS: dict[str, torch.Tensor] = {
    "parameter": torch.nn.Parameter(NUMBERS),
    "fp8": NUMBERS.to(torch.float8_e4m3fn),
    "complex": torch.complex(NUMBERS, -NUMBERS),
    "conjugate": torch.complex(NUMBERS, -NUMBERS).conj(),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_tensor_is_read_as_torch_reads_it_without_its_unpickler(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = chunk_of(tmp_path, PLAIN[kind])
    theirs = torch.load(tmp_path / FILE, weights_only=True)
    monkeypatch.setattr(torch, "load", None)
    ours = Shards(tmp_path).part(chunk)
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert torch.equal(ours, theirs) and torch.equal(ours, PLAIN[kind])


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_tensor_is_left_to_torch(tmp_path: Path, kind: str) -> None:
    chunk = chunk_of(tmp_path, OTHERS[kind])
    ours = Shards(tmp_path).part(chunk)
    assert ours.dtype == OTHERS[kind].dtype
    assert torch.equal(ours.to(torch.complex64), OTHERS[kind].detach().to(torch.complex64))


@settings(deadline=None)
@given(data=st.data())
def test_any_region_is_put_together_of_the_parts_that_any_ranks_have_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="shape"))
    cuts = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape
    ]
    whole = torch.randn(shape)
    folder = tmp_path_factory.mktemp("shards")
    chunks = []
    for sides in product(*([*pairwise(cut)] for cut in cuts)):
        part = whole[tuple(slice(*side) for side in sides)]
        place = place_of(folder, torch_saved(part.clone()))
        chunks.append(Chunk(tuple(start for start, _ in sides), tuple(part.shape), place))
    tensor = Tensor("weight", shape, "float32", tuple(data.draw(st.permutations(chunks))))

    start = [data.draw(st.integers(0, size - 1), label="start") for size in shape]
    ends = [data.draw(st.integers(s, size)) for s, size in zip(start, shape, strict=True)]
    region = torch.empty([end - s for s, end in zip(start, ends, strict=True)])
    Shards(folder).fill(region, tensor, start)
    assert torch.equal(region, whole[tuple(map(slice, start, ends))])

    depth = data.draw(st.integers(0, len(shape)), label="depth")
    assert torch.equal(read(folder, tensor, tuple(start[:depth])), whole[tuple(start[:depth])])


def test_numbers_are_rounded_to_the_precision_of_what_they_are_read_into(tmp_path: Path) -> None:
    tensor = Tensor("weight", (2, 3, 4), "float32", (chunk_of(tmp_path, NUMBERS / 3),))
    region = torch.empty(2, 3, 4, dtype=torch.bfloat16)
    Shards(tmp_path).fill(region, tensor, (0, 0, 0))
    assert torch.equal(region, (NUMBERS / 3).bfloat16())


def test_a_part_that_nobody_has_written_is_named_with_the_numbers(tmp_path: Path) -> None:
    top = Chunk((0, 0), (2, 4), place_of(tmp_path, torch_saved(torch.ones(2, 4))))
    tensor = Tensor("weight", (4, 4), "float32", (top,))
    said = (
        f"cannot read the checkpoint {tmp_path}: it holds {{}} numbers of weight{{}} in place of "
    )
    with pytest.raises(CheckpointError, match=re.escape(said.format(8, "") + "16")):
        read(tmp_path, tensor)
    with pytest.raises(CheckpointError, match=re.escape(said.format(0, " from [3, 0] on") + "4")):
        read(tmp_path, tensor, (3,))


def test_a_tensor_of_another_shape_than_metadata_says_is_not_taken_for_it(tmp_path: Path) -> None:
    one = Chunk((0, 0), (2, 4), place_of(tmp_path, torch_saved(torch.ones(1, 4))))
    with pytest.raises(CheckpointError, match=r"has a tensor of \[1, 4\] in place of one of \[2, "):
        read(tmp_path, Tensor("weight", (2, 4), "float32", (one,)))


# Trust.


def changed_pickle(stored: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return what torch.save has written with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored)) as before, zipfile.ZipFile(stream, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return stream.getvalue()


LIES: dict[str, tuple[bytes, bytes]] = {
    # Four rows of four numbers, of sixteen, from the first on: what the pickle says.
    "rows": (b"K\x00K\x04K\x04\x86", b"K\x00K\x28K\x04\x86"),
    "offset": (b"K\x00K\x04K\x04\x86", b"K\x09K\x04K\x04\x86"),
    "stride": (b"K\x04K\x01\x86", b"K\x28K\x01\x86"),
    "numbers": (b"cpuq\x04K\x10", b"cpuq\x04K\x7f"),
    "dtype": (b"FloatStorage", b"DoubleStorage"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_pickle_that_lies_about_its_numbers_reaches_no_other_memory(
    tmp_path: Path, lie: str
) -> None:
    true, false = LIES[lie]
    stored = torch_saved(torch.ones(4, 4))
    assert torch.equal(
        torch.load(io.BytesIO(changed_pickle(stored, lambda p: p))), torch.ones(4, 4)
    )

    def change(pickled: bytes) -> bytes:
        assert pickled.count(true) == 1
        return pickled.replace(true, false)

    chunk = Chunk((0, 0), (4, 4), place_of(tmp_path, changed_pickle(stored, change)))
    with pytest.raises(CheckpointError, match=f"cannot read the checkpoint {tmp_path}: "):
        read(tmp_path, Tensor("weight", (4, 4), "float32", (chunk,)))


def metadata_of(**changes: Any) -> Metadata:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    kind = TensorStorageMetadata(TensorProperties(), torch.Size([4]), [chunk])
    stored = {MetadataIndex("weight", torch.Size([0])): _StorageInfo(FILE, 0, 9)}
    return Metadata(**{"state_dict_metadata": {"weight": kind}, "storage_data": stored} | changes)


def test_metadata_that_is_no_checkpoints_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(metadata_of()))
    assert [len(tensor.chunks) for tensor in contents_of(tmp_path).tensors.values()] == [1]
    no_chunks = TensorStorageMetadata(TensorProperties(), torch.Size([4]), None)  # type: ignore[arg-type]
    for wrong in (
        {"state_dict_metadata": None},
        {"state_dict_metadata": {"weight": no_chunks}},
        {"storage_data": {"weight": _StorageInfo(FILE, 0, 9)}},
    ):
        file.write_bytes(pickle.dumps(metadata_of(**wrong)))
        said = f"cannot read the checkpoint {tmp_path}: .metadata is damaged: "
        with pytest.raises(CheckpointError, match=re.escape(said)):
            contents_of(tmp_path)


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("protocol", range(6))
def test_neither_unpickler_imports_or_calls_what_a_pickle_names(
    tmp_path: Path, protocol: int
) -> None:
    for content in (Evil(tmp_path / "trace"), [Evil(tmp_path / "trace")], print, torch.load):
        pickled = pickle.dumps(content, protocol=protocol)
        assert makings_of_tensor(pickled) is None
        assert plain_value(pickled) is None
    # What `.metadata` may name, tensors and values may not.
    for named in (b"torch.serialization\n_get_layout", b"torch.Size", b"builtins\nstr"):
        pickled = b"c" + named.replace(b".Size", b"\nSize") + b"\n(tR."
        assert makings_of_tensor(pickled) is None and plain_value(pickled) is None
    assert not (tmp_path / "trace").exists()


def test_a_plain_value_is_what_was_pickled() -> None:
    for value in ([None], {"a": (1, 2.5, "b", b"c", True)}, {1, 2}, None):
        assert plain_value(pickle.dumps(value)) == (value,)
    with_tensor = zipfile.ZipFile(io.BytesIO(torch_saved([torch.ones(2)])))
    assert plain_value(with_tensor.read("archive/data.pkl")) is None


# Ranks.


TP2 = changed(SMALL, layout={"tensor_model_parallel_size": 2}, training={"steps": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(TP2, 2, folder)
    return folder / "checkpoints" / "step-00000001"


def test_an_object_that_is_not_there_is_named(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / MANIFEST).unlink()
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    gone = [index for index in metadata.storage_data if index.fqn.startswith("rng_state/")]
    for index in gone:
        del metadata.storage_data[index], metadata.state_dict_metadata[index.fqn]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    again = changed(TP2, training={"steps": 2, "resume": str(copy)})
    said = f"cannot read the checkpoint {copy}: it has no rng_state/shard_0"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        run(again, 2, tmp_path / "again")


def test_a_rank_that_cannot_read_its_disk_stops_every_rank_with_the_reason(
    saved: Path, tmp_path: Path
) -> None:
    def on_a_bad_disk(arguments: RunArguments) -> str:
        def hook(event: str, what: tuple[Any, ...]) -> None:
            if event == "open" and str(what[0]).endswith(".distcp"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        if os.environ["RANK"] == "1":
            sys.addaudithook(hook)
        with pytest.raises(CheckpointError) as raised:
            run_rank(arguments)
        return str(raised.value)

    again = changed(TP2, training={"steps": 2, "resume": str(saved)}, checkpoint={"verify": "off"})
    arguments = RunArguments(recipe=again, run_dir=tmp_path / "again", json=True)
    said = f"cannot read the checkpoint {saved}: [Errno {errno.EIO}] {os.strerror(errno.EIO)}"
    assert launch(on_a_bad_disk, 2, arguments, timeout=60) == [said, said]
