"""Megatron-Core's parallelism, made something that anyone can run, prove and plan.

What is listed in `__all__`, and in that of the modules among it, is the public API:
`recipes/python.md` shows it. Importing this package imports neither torch nor Megatron-Core; a name
is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_lab import cpu, runtime, verify
    from mcore_lab.config import (
        Checkpoint,
        Data,
        Model,
        Recipe,
        Training,
        recipe_from_toml,
        recipe_to_toml,
    )
    from mcore_lab.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DataError,
        LabError,
        LayoutError,
        LostPeerError,
        NotFiniteError,
        PreemptedError,
        RankFailedError,
        RunFolderError,
    )
    from mcore_lab.layout import ParallelLayout
    from mcore_lab.notebook import launch
    from mcore_lab.recipes import find_recipe, recipe_names
    from mcore_lab.training import RunFolder

    __version__: str

__all__ = [
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Data",
    "DataError",
    "LabError",
    "LayoutError",
    "LostPeerError",
    "Model",
    "NotFiniteError",
    "ParallelLayout",
    "PreemptedError",
    "RankFailedError",
    "Recipe",
    "RunFolder",
    "RunFolderError",
    "Training",
    "__version__",
    "cpu",
    "find_recipe",
    "launch",
    "recipe_from_toml",
    "recipe_names",
    "recipe_to_toml",
    "runtime",
    "verify",
]

_MODULES = ("cpu", "runtime", "verify")
_FROM = {
    "launch": "notebook",
    "ParallelLayout": "layout",
    "RunFolder": "training",
    "find_recipe": "recipes",
    "recipe_names": "recipes",
    **dict.fromkeys(("Checkpoint", "Data", "Model", "Recipe", "Training"), "config"),
    **dict.fromkeys(("recipe_from_toml", "recipe_to_toml"), "config"),
}
"""The module that a name is of; what ends in `Error` is of `errors`."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mcore_lab.version import installed_version

        return installed_version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
