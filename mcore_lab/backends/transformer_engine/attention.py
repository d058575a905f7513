"""Transformer Engine's core attention, on the one of this project."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.backends.context_parallel import TorchDotProductAttention
from mcore_lab.backends.transformer_engine.refusals import check_supported


class TEDotProductAttention(TorchDotProductAttention):
    """A core attention for every layout, with the parameters of Transformer Engine's."""

    def __init__(self, config: TransformerConfig, *args: Any, **arguments: Any) -> None:
        check_supported(config)
        super().__init__(config, *args, **arguments)
