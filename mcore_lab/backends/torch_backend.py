"""The `torch` backend: Megatron-Core's parallel layers, with modules of pure PyTorch in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs

from mcore_lab.backends.norm import TorchNorm


class TorchSpecProvider(LocalSpecProvider):
    """A `BackendSpecProvider` that needs neither Transformer Engine nor Apex."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        """Which module for layer norm: one that works under sequence parallelism."""
        return TorchNorm


@contextmanager
def in_place_of_local() -> Iterator[None]:
    """Let Megatron-Core's local layer specs be built from `TorchSpecProvider`.

    Its spec functions name `LocalSpecProvider` and take no provider as an argument.
    """
    local, norm = gpt_layer_specs.LocalSpecProvider, gpt_layer_specs.LNImpl
    gpt_layer_specs.LocalSpecProvider = TorchSpecProvider
    gpt_layer_specs.LNImpl = TorchNorm
    try:
        yield
    finally:
        gpt_layer_specs.LocalSpecProvider, gpt_layer_specs.LNImpl = local, norm
