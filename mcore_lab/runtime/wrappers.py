"""What Megatron-Core wraps a model in."""

from __future__ import annotations

from typing import Any

import torch


def unwrapped(chunk: torch.nn.Module) -> Any:
    """Return the Megatron-Core model inside its wrappers (DDP, `Float16Module`)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
