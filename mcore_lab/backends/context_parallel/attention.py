"""Megatron-Core's core attention in pure PyTorch, with context parallelism and packed sequences."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from mcore_lab.backends.context_parallel.all_to_all import check_heads
from mcore_lab.backends.context_parallel.functional import (
    check_groups,
    context_parallel_attention,
)
from mcore_lab.backends.context_parallel.masks import is_causal
from mcore_lab.backends.context_parallel.packed import packed_documents
from mcore_lab.errors import LayoutError


class TorchDotProductAttention(DotProductAttention):
    """What `TEDotProductAttention` is to Transformer Engine: attention for every layout.

    With a context-parallel size of 1 and no packed sequences it is Megatron-Core's own
    `DotProductAttention`. Else each rank has its zigzag chunks of the sequence, and `cp_comm_type`
    (`p2p` if not set) says how the ranks communicate; memory grows with the sequence, not with its
    square. Multi-latent attention's values may have channels of their own (`v_channels`).

    Raises LayoutError for what the torch backend cannot do over several ranks or packed sequences:
    attention dropout, windows, softmax offsets, biases, and masks that are neither causal nor none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            _of_one_rank(config),
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        self._cp_group: dist.ProcessGroup | None = None
        self._cp_comm_type = _comm_type(config, layer_number, cp_comm_type)
        self._cp_groups: list[dist.ProcessGroup] = []
        if config.context_parallel_size > 1:
            self._join(pg_collection)

    def _join(self, pg_collection: ProcessGroupCollection | None) -> None:
        """Find the groups to communicate in, and see that they can be used."""
        collected = getattr(pg_collection, "cp", None)
        self._cp_group = collected or parallel_state.get_context_parallel_group()
        self._cp_groups = [self._cp_group]
        if self._cp_comm_type == "a2a+p2p":
            hierarchy = parallel_state.get_hierarchical_context_parallel_groups
            self._cp_groups = hierarchy(check_initialized=False) or []
        check_groups(self._cp_comm_type, self._cp_groups)
        if self._cp_comm_type.startswith("a2a"):
            check_heads(
                self.num_attention_heads_per_partition,
                self.num_query_groups_per_partition,
                self._cp_groups[0].size(),
            )
        self._check_supported()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attend, with queries `[s, b, n, d]`; return `[s, b, n * v]`.

        In `thd` format queries are `[t, n, d]`, and `[t, n * v]` is returned. s and t are this
        rank's tokens, n its heads. `num_splits` is a setting of Transformer Engine's kernels.
        """
        packed = packed_seq_params
        if packed is not None and packed.qkv_format != "thd":
            packed = None
        if packed is None and not self._cp_groups:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        if attention_bias is not None:
            raise LayoutError("the torch backend has no attention bias")
        mask_type = attn_mask_type or self.attn_mask_type
        if packed is not None:
            return self._packed(query, key, value, attention_mask, mask_type, packed)
        ...
