"""Replace a name of torch or Megatron-Core, and where it has been imported from there already."""

from __future__ import annotations

import inspect
import sys
from typing import Any

_replaced: dict[int, tuple[Any, Any]] = {}


def replace(owner: Any, name: str, new: Any) -> None:
    """Set `owner.name`, and remember what stood there for `update_importers`."""
    old = getattr(owner, name, None)
    if callable(old):
        # Keeping the old object alive keeps its id its own.
        _replaced[id(old)] = (old, new)
    setattr(owner, name, new)


def update_importers() -> None:
    """Let Megatron-Core's loaded modules see what has been replaced under names of their own.

    `from torch.cuda import _lazy_call` and `gather = torch.distributed.all_gather_into_tensor` bind
    what was there when the module was imported. Functions that torch.compile has wrapped by then
    are unwrapped: on CPU each would run a compiler in every rank.
    """
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("megatron."):
            _update(module)
            for value in list(vars(module).values()):
                if inspect.isclass(value) and value.__module__ == module_name:
                    _update(value)


def _update(namespace: Any) -> None:
    for name, value in list(vars(namespace).items()):
        if id(value) in _replaced:
            setattr(namespace, name, _replaced[id(value)][1])
        elif inspect.isfunction(value) and hasattr(value, "_torchdynamo_orig_callable"):
            setattr(namespace, name, value._torchdynamo_orig_callable)
