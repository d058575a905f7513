"""A checkpoint from elsewhere runs no code: what its pickles want is refused by name."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, changed, run
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from mcore_lab.checkpoint.manifest import MANIFEST
from mcore_lab.checkpoint.trust import read_metadata, require_harmless, weights_only
from mcore_lab.cli import main
from mcore_lab.errors import CheckpointError

RECIPE = changed(SMALL, training={"steps": 1})
WANTED = "posix.system"


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(RECIPE, 1, folder)
    return folder / "checkpoints" / "step-00000001"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint from elsewhere: nothing says what it should be."""
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).unlink()
    return tmp_path / "copy"


def torch_saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


# Where a pickle can be.


def in_metadata(folder: Path, evil: Evil) -> None:
    """Beside all that a real `.metadata` holds."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"": evil}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def instead_of_metadata(folder: Path, evil: Evil) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(evil, protocol=0))


def in_common_state(folder: Path, evil: Evil) -> None:
    """`common.pt` before Megatron-Core 0.17, then an object in a shard."""
    if (folder / "common.pt").exists():
        (folder / "common.pt").write_bytes(torch_saved({"iteration": 1, "evil": evil}))
    else:
        replace_item(folder, "common_state/", torch_saved([evil]))


def in_an_object_of_a_shard(folder: Path, evil: Evil) -> None:
    replace_item(folder, "_extra_state/", torch_saved([evil]))


def in_a_tensor_of_a_shard(folder: Path, evil: Evil) -> None:
    replace_item(folder, "embedding.word_embeddings.weight", torch_saved(evil))


def replace_item(folder: Path, name: str, content: bytes) -> None:
    """Let `.metadata` find the item, for every shard of it, in other bytes at the end of a file."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    places = [place for index, place in metadata.storage_data.items() if name in index.fqn]
    assert places
    for place in places:
        with (folder / place.relative_path).open("ab") as file:
            place.offset, place.length = file.tell(), len(content)
            file.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = [
    in_metadata,
    instead_of_metadata,
    in_common_state,
    in_an_object_of_a_shard,
    in_a_tensor_of_a_shard,
]


@pytest.mark.parametrize("place", PLACES)
def test_a_load_runs_nothing_and_names_what_was_wanted(
    copy: Path, tmp_path: Path, place: Callable[[Path, Evil], None]
) -> None:
    place(copy, Evil(tmp_path / "trace"))
    recipe = changed(RECIPE, training={"steps": 2, "resume": str(copy)})
    with pytest.raises(CheckpointError) as raised:
        run(recipe, 1, tmp_path / "run")
    assert not (tmp_path / "trace").exists()
    message = str(raised.value)
    assert message.startswith(f"cannot read the checkpoint {copy}: ")
    assert f"it wants {WANTED}, which no checkpoint is made of" in message
    assert "\n" not in message and "add_safe_globals" not in message


def test_what_is_refused_here_does_run_without_the_guards(tmp_path: Path) -> None:
    """So the guards are needed: torch's planner and reader unpickle whatever they find."""
    evil = Evil(tmp_path / "trace")
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "trace").exists()
    (tmp_path / "trace").unlink()

    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict, planner.metadata = {}, {"it": BytesStorageMetadata()}
    index = torch.distributed.checkpoint.metadata.MetadataIndex("it")
    size = torch.Size([0])
    item = ReadItem(LoadItemType.BYTE_IO, index, size, index, size, size)
    with weights_only(), pytest.raises(pickle.UnpicklingError, match=WANTED):
        planner.load_bytes(item, io.BytesIO(torch_saved(evil)))
    assert not (tmp_path / "trace").exists()
    planner.load_bytes(item, io.BytesIO(torch_saved(evil)))
    assert (tmp_path / "trace").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_torch_did_not_write_runs_nothing_either(
    tmp_path: Path, protocol: int
) -> None:
    evil = pickle.dumps(Evil(tmp_path / "trace"), protocol=protocol)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(evil), weights_only=False)
    (tmp_path / ".metadata").write_bytes(evil)
    with pytest.raises(CheckpointError, match=f"it wants {WANTED}"):
        read_metadata(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "wanted",
    [
        "builtins.eval",
        "builtins.getattr",
        "os.system",
        "torch.load",
        "torch.hub.load",
        "torch.Tensor",
    ],
)
def test_only_what_metadata_is_made_of_can_be_named_in_it(tmp_path: Path, wanted: str) -> None:
    module, _, name = wanted.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(CheckpointError) as raised:
        read_metadata(tmp_path)
    assert f".metadata: it wants {wanted}, which no checkpoint" in str(raised.value)
    with pytest.raises(CheckpointError, match=f"it wants {wanted}"):
        require_harmless("_extra_state", f"c{module}\n{name}\n.".encode())


def test_what_is_named_can_be_neither_reached_through_nor_changed(tmp_path: Path) -> None:
    """By dots in a name, from protocol 4 on, or by setting attributes of a class."""
    dotted = "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04" + b"".join(b"\x8c%c%s" % (len(s), s.encode()) for s in dotted) + b"\x93."
    )
    with pytest.raises(CheckpointError, match=r"it wants .*__globals__"):
        read_metadata(tmp_path)
    setting = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'x'\nI1\nstb."
    (tmp_path / ".metadata").write_bytes(setting)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_metadata(tmp_path)


def test_the_extra_state_of_transformer_engine_cannot_name_what_it_is_not_made_of(
    tmp_path: Path,
) -> None:
    """Transformer Engine unpickles the bytes that the tensor holds."""
    from mcore_lab.checkpoint.load import _put_weights

    class Unpickling(torch.nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.extra = pickle.loads(state.numpy().tobytes())

    layer = Unpickling(2, 2)
    state = dict(layer.state_dict())
    for extra in ({"scale": torch.ones(2), "size": torch.Size([2])}, Evil(tmp_path / "trace")):
        pickled = bytearray(pickle.dumps(extra))
        state["_extra_state"] = torch.frombuffer(pickled, dtype=torch.uint8)
        if isinstance(extra, dict):
            _put_weights([layer], {"model": state})
            assert torch.equal(layer.extra["scale"], extra["scale"])
        else:
            with pytest.raises(CheckpointError, match=f"_extra_state: it wants {WANTED}"):
                _put_weights([layer], {"model": state})
    assert not (tmp_path / "trace").exists()


def test_metadata_is_read_without_importing_what_it_names(saved: Path) -> None:
    here = read_metadata(saved)
    there = pickle.loads((saved / ".metadata").read_bytes())
    assert here.state_dict_metadata.keys() == there.state_dict_metadata.keys()
    name = "embedding.word_embeddings.weight"
    ours, theirs = here.state_dict_metadata[name], there.state_dict_metadata[name]
    assert ours.size == tuple(theirs.size) and ours.properties.arguments[0] == "float32"
    assert [(chunk.offsets, chunk.sizes) for chunk in ours.chunks] == [
        (tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in theirs.chunks
    ]


def test_metadata_cannot_send_a_reader_out_of_the_folder(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../secret"
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata sends to \.\./secret, out of it"):
        read_metadata(copy)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"no": "metadata"})])
def test_metadata_that_is_none_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_metadata(tmp_path)
    assert str(raised.value).startswith(f"cannot read the checkpoint {tmp_path}: .metadata is dam")
    assert "\n" not in str(raised.value)


def test_the_command_that_verifies_refuses_it_too(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest can be of whoever wrote the rest."""
    from mcore_lab.checkpoint.manifest import read_manifest, record

    shutil.copytree(saved, tmp_path / "copy")
    in_metadata(tmp_path / "copy", Evil(tmp_path / "trace"))
    manifest = read_manifest(saved)
    assert manifest is not None
    manifest.files[".metadata"] = record(tmp_path / "copy" / ".metadata", 0)  # type: ignore[index]
    (tmp_path / "copy" / MANIFEST).write_bytes(manifest.render())
    assert main(["checkpoint", "verify", str(tmp_path / "copy")]) == 2
    assert f"it wants {WANTED}" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def test_what_forces_torch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with weights_only():
        assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
