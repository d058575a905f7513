"""What a recipe module of one's own is made of; import it before Megatron-Core.

`mcore-lab new` writes such a module: it defines `RECIPE`, whose name is its file, and `build`,
which returns a rank's part of the model. Imported when they are asked for, as Megatron-Core is to
be imported without its warnings, and on CPU without torch.compile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_lab.backends import Backend, decoder_block_spec
    from mcore_lab.compat import built_as
    from mcore_lab.model import Stage, gpt_chunk

__all__ = ["Backend", "Stage", "built_as", "decoder_block_spec", "gpt_chunk"]

_MODULES = {
    "Backend": "backends",
    "Stage": "model",
    "built_as": "compat",
    "decoder_block_spec": "backends",
    "gpt_chunk": "model",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from mcore_lab import cpu
    from mcore_lab.runtime import choose_device

    if choose_device(1).type == "cpu":
        cpu.preload()
    return getattr(importlib.import_module(f"mcore_lab.{_MODULES[name]}"), name)
