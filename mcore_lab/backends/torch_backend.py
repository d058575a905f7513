"""The `torch` backend: Megatron-Core's parallel layers, with modules of pure PyTorch in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs

from mcore_lab.backends.context_parallel import TorchDotProductAttention
from mcore_lab.backends.experts import GroupedExperts, SequentialExperts
from mcore_lab.backends.latent_attention import TorchMLASelfAttention
from mcore_lab.backends.norm import TorchNorm


class TorchSpecProvider(LocalSpecProvider):
    """A `BackendSpecProvider` that needs neither Transformer Engine nor Apex."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        """Which module for layer norm: one that works under sequence parallelism."""
        return TorchNorm

    def core_attention(self) -> type:
        """Which module for attention: one that splits sequences and takes values of any width."""
        return TorchDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, *legacy: bool) -> Any:
        """Which module for experts: one product for all under `moe_grouped_gemm`, else a loop.

        Returned as the installed Megatron-Core does: the module and its submodules, or a function
        that builds it.
        """
        sequential = super().grouped_mlp_modules(False, *(False for _ in legacy))
        module = GroupedExperts if moe_use_grouped_gemm else SequentialExperts
        if isinstance(sequential, tuple):
            return module, sequential[1]
        return partial(module, **sequential.keywords)


@contextmanager
def in_place_of_local() -> Iterator[None]:
    """Let Megatron-Core's local layer specs be built from the modules of this backend.

    Its spec functions name their classes and take no provider as an argument.
    """
    ours = {
        "LocalSpecProvider": TorchSpecProvider,
        "LNImpl": TorchNorm,
        "MLASelfAttention": TorchMLASelfAttention,
    }
    theirs = {name: getattr(gpt_layer_specs, name) for name in ours}
    vars(gpt_layer_specs).update(ours)
    try:
        yield
    finally:
        vars(gpt_layer_specs).update(theirs)
