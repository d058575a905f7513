"""Megatron-Core's core attention in pure PyTorch, with context parallelism and packed sequences."""

from __future__ import annotations

import copy

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import Parameter

from mcore_lab.backends.context_parallel.all_to_all import check_heads
from mcore_lab.backends.context_parallel.functional import check_groups, context_parallel_attention
from mcore_lab.backends.context_parallel.masks import check_mask, is_causal
from mcore_lab.backends.context_parallel.packed import packed_documents
from mcore_lab.backends.context_parallel.zigzag import Documents
from mcore_lab.errors import LayoutError


class TorchDotProductAttention(DotProductAttention):
    """A core attention for every layout, as `TEDotProductAttention` is with Transformer Engine.

    With a context-parallel size of 1 and no packed sequences it is Megatron-Core's own
    `DotProductAttention`. Else each rank has its zigzag chunks of the sequence, `cp_comm_type`
    (`p2p` if not set) says how the ranks communicate, and memory grows with the sequence, not with
    its square. The values of multi-latent attention may have channels of their own.

    Raises LayoutError for what cannot be done then: heads that the ranks cannot share, attention
    dropout, windows, softmax offsets, biases, and masks that are neither causal nor none.
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
        if isinstance(self.softmax_offset, Parameter):
            # Split by heads: without the mark the norm that clips gradients has one rank's only
            # (Megatron-LM #7452, finding 8).
            self.softmax_offset.tensor_model_parallel = True  # type: ignore[attr-defined]
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        self._comm_type = cp_comm_type or "p2p"
        self._rank, self._size = 0, 1
        self._cp_groups: list[dist.ProcessGroup] = []
        if config.context_parallel_size > 1:
            self._join_groups(getattr(pg_collection, "cp", None))
            self._check_supported("context parallelism")

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
        """Return the output `[s, b, n * v]` of queries `[s, b, n, d]`; keys may have fewer heads.

        In `thd` format queries are `[t, n, d]` and the output is `[t, n * v]`. s and t are the
        tokens that this rank holds, n its heads. `num_splits` is of Transformer Engine's kernels.
        """
        packed = packed_seq_params if _is_packed(packed_seq_params) else None
        if packed is None and not self._cp_groups:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        _refuse_bias(attention_bias)
        causal = is_causal(attn_mask_type or self.attn_mask_type)
        if packed is not None:
            return self._of_documents(query, key, value, attention_mask, packed, causal)
        check_mask(
            attention_mask, causal=causal, tokens=len(query), rank=self._rank, size=self._size
        )
        return self._attend(query, key, value, causal).flatten(2)

    def _of_documents(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        packed: PackedSeqParams,
        causal: bool,
    ) -> Tensor:
        if mask is not None:
            raise LayoutError("packed sequences are told apart by cu_seqlens: attention_mask=None")
        if not self._cp_groups:
            self._check_supported("packed sequences", dropping=self.training)
        documents = packed_documents(packed, len(query), self._size)
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        return self._attend(query, key, value, causal, documents).squeeze(1).flatten(1)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        documents: Documents | None = None,
    ) -> Tensor:
        # Megatron-Core divides the scale by the layer number before the product of queries and
        # keys, for fp16's sake, and multiplies by it again afterwards.
        layer = self.layer_number if self.config.apply_query_key_layer_scaling else 1
        return context_parallel_attention(
            query,
            key,
            value,
            groups=self._cp_groups,
            comm_type=self._comm_type,
            causal=causal,
            scale=self.softmax_scale * layer,
            documents=documents,
        )

    def _join_groups(self, cp_group: dist.ProcessGroup | None) -> None:
        """Find the groups that share each sequence, and see that they can share the heads."""
        cp_group = cp_group or parallel_state.get_context_parallel_group()
        self._rank, self._size = cp_group.rank(), cp_group.size()
        self._cp_groups = [cp_group]
        if self._comm_type == "a2a+p2p":
            hierarchy = parallel_state.get_hierarchical_context_parallel_groups
            self._cp_groups = hierarchy(check_initialized=False) or []
        check_groups(self._comm_type, self._cp_groups)
        if self._comm_type in ("a2a", "a2a+p2p"):
            heads = self.num_attention_heads_per_partition
            groups = self.num_query_groups_per_partition
            check_heads(heads, groups, self._cp_groups[0].size())

    def _check_supported(self, wanted: str, *, dropping: bool = True) -> None:
        """Raise LayoutError with every setting that stands in the way of what is wanted."""
        config = self.config
        window = config.window_size, config.window_attn_skip_freq, self.layer_number
        in_the_way = {
            "attention_dropout=0.0": dropping and self.attention_dropout.p > 0,
            "window_size=None": is_layer_window_attention(*window),
            "softmax_type='vanilla'": config.softmax_type != "vanilla",
            "qk_clip=False": config.qk_clip,
            "log_max_attention_logit=False": config.log_max_attention_logit,
        }
        needed = [setting for setting, wrong in in_the_way.items() if wrong]
        if needed:
            raise LayoutError(
                f"{wanted} with the torch backend needs {', '.join(needed)} in the model's "
                "configuration"
            )


def _of_one_rank(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration that Megatron-Core's own attention takes, without a check of it."""
    if config.context_parallel_size == 1:
        return config
    config = copy.copy(config)
    config.context_parallel_size = 1
    return config


def _is_packed(packed: PackedSeqParams | None) -> bool:
    return packed is not None and packed.qkv_format == "thd"


def _refuse_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise LayoutError(
            "the torch backend has no attention bias with context parallelism and packed "
            "sequences: attention_bias=None"
        )
