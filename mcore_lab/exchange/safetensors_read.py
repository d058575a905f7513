"""Read safetensors files, one or several with an index, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.naming import Shape
from mcore_lab.exchange.safetensors_write import INDEX, SINGLE


class SafetensorsFiles:
    """The tensors of a safetensors file, or of those in a folder. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        """Of the tensors, by name."""
        for file in _files(path):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if name in self._where:
                        raise CheckpointError(f"cannot read {file}: {name} is in another file too")
                    self._where[name] = file
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        with _opened(self._where[name]) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def folder_of(path: Path) -> Path:
    """Return where what describes the tensors lies: beside them."""
    return path if path.is_dir() else path.parent


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}: it is not an object of JSON")
    return content


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"there are no tensors at {path}: no such file or folder")
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise CheckpointError(f"there are no tensors at {path}: neither {SINGLE} nor {INDEX}")
    where = read_json(path / INDEX).get("weight_map")
    names = set(where.values()) if isinstance(where, dict) else {""}
    for name in names:
        if not isinstance(name, str) or not name or PurePath(name).name != name:
            raise CheckpointError(f"cannot read {path / INDEX}: {name!r} is no file beside it")
    return [path / name for name in sorted(names)]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
