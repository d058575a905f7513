"""A checkpoint from elsewhere runs no code here. No torch in here.

A pickle names what it is made of, and whoever unpickles it imports what is named and calls it.
Three kinds of pickles in a checkpoint would be read so: `.metadata` (torch's
`FileSystemReader.read_metadata`, a plain `pickle.load`), what is no tensor in the shards, which
torch's planner loads with `weights_only=False` (`DefaultLoadPlanner.load_bytes`; both through torch
2.13), and the bytes of `_extra_state`, which Transformer Engine unpickles (`set_extra_state`).
Those of tensors are harmless by torch's weights-only unpickler, and by one in here that is faster.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from mcore_lab.errors import CheckpointError

METADATA = ".metadata"
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING", "TensorProperties"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
}
"""What `.metadata` is made of: plain records, of which none does anything when it is made."""

_PLAIN: dict[str, Callable[..., Any]] = {
    "torch.Size": tuple,
    "torch.serialization._get_layout": lambda name: name,
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": int,
    "collections.OrderedDict": dict,
}

_DTYPE = re.compile(r"bool|b?float\d+(_e\d\w+)?|complex\d+|u?int\d+")


_EXTRA_STATE = re.compile(
    r"collections\.OrderedDict|torch\.(Size|storage\.(UntypedStorage|_load_from_bytes))"
    r"|torch\.(_utils\._rebuild_tensor_v2|_tensor\._rebuild_from_type_v2)"
    r"|transformer_engine\.common\.recipe\.(\w+Scaling|Format|_FormatHelper|MMParams|QParams)"
    r"|megatron\.core\.extensions\.transformer_engine\.TEDelayedScaling"
    r"|megatron\.core\.safe_globals\.safe_load_from_bytes"
)
"""What Transformer Engine's scaling factors and recipes are made of; as in Megatron-Core 0.19's
`safe_globals.SafeUnpickler`. `_load_from_bytes` is `torch.load`, which is to be held to weights;
0.19 puts its own, which is, in the place of it."""


class Record:
    """Stands for an object of a class that is not imported: what it is made of, and no more."""

    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any) -> Record:
        """Keep what the class would have been called with."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.arguments = state


class _Unpickler(pickle.Unpickler):
    """Unpickles `.metadata` into records; nothing that it names is imported, or is code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return type(name, (Record,), {})
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        plain = _PLAIN.get(f"{module}.{name}")
        if plain is None:
            raise CheckpointError(refusal(f"{module}.{name}"))
        return plain


class _ExtraStateUnpickler(_Unpickler):
    """Unpickles `_extra_state` into records."""

    def find_class(self, module: str, name: str) -> Any:
        if _EXTRA_STATE.fullmatch(f"{module}.{name}"):
            return type(name, (Record,), {})
        return super().find_class(module, name)


class Makings(NamedTuple):
    """What torch.save writes of a plain tensor, beside its numbers."""

    storage: str
    """The class of torch's that has numbers of its dtype."""
    key: str
    """Of the record that has the numbers."""
    numel: int
    """How many there are."""
    offset: int
    """The tensor's first among them."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles a tensor into tuples; all else that torch.save writes is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *made_of: made_of
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise CheckpointError(refusal(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> Any:
        return pid


def makings_of_tensor(pickled: bytes) -> Makings | None:
    """Return what a tensor that torch.save has pickled is made of, or None if it is no plain one.

    Runs nothing, whatever the pickle wants.
    """
    try:
        storage, offset, shape, stride, _, _ = _TensorUnpickler(io.BytesIO(pickled)).load()
        kind, name, key, _, numel = storage
    # Whatever else it is; torch's own unpickler tells what is wrong with it, if anything is.
    except Exception:
        return None
    is_plain = kind == "storage" and str(key).isdigit()
    return Makings(name, key, numel, offset, shape, stride) if is_plain else None


class _ValueUnpickler(pickle.Unpickler):
    """Unpickles plain values; whatever a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise CheckpointError(refusal(f"{module}.{name}"))


def plain_value(pickled: bytes) -> tuple[Any] | None:
    """Return, in a tuple, what has been pickled, or None if it is not of plain values alone."""
    try:
        return (_ValueUnpickler(io.BytesIO(pickled)).load(),)
    except Exception:
        return None


def refusal(wanted: str) -> str:
    """Return what is said of a pickle that wants something which no checkpoint is made of."""
    return f"it wants {wanted}, which no checkpoint is made of, and is refused: it could run code"


def read_metadata(folder: Path) -> Any:
    """Return `.metadata` of the checkpoint in `folder` as records with torch's names of fields.

    The same bytes can then be unpickled by torch: a pickle that asks for nothing else here asks for
    nothing else there. Raises CheckpointError if it wants anything else, if it is damaged, or if
    what it describes lies outside of the folder.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        items = metadata.storage_data.values()
        outside = [
            i.relative_path for i in items if PurePath(i.relative_path).name != i.relative_path
        ]
    except CheckpointError as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {METADATA}: {error}") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: {METADATA}: {error.strerror}"
        ) from None
    # Whatever else a pickle that is none, or of something else, makes of itself.
    except Exception as error:
        raise damaged(folder, error) from None
    if outside:
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: {METADATA} sends to {outside[0]}, out of it"
        )
    return metadata


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """Return what is said of `.metadata` that is no checkpoint's."""
    return CheckpointError(f"cannot read the checkpoint {folder}: {METADATA} is damaged: {error}")


def require_harmless(name: str, pickled: bytes) -> None:
    """Raise CheckpointError if an `_extra_state` wants what it is not made of, or is no pickle."""
    try:
        _ExtraStateUnpickler(io.BytesIO(pickled)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except Exception as error:
        raise CheckpointError(f"{name} is damaged: {error}") from None


@contextmanager
def weights_only() -> Iterator[None]:
    """Let `torch.load` make tensors and plain values alone, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
