"""How each matrix of a model is cut: which rank of which dimension holds which rows or columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mcore_lab.layout.parallel import ParallelLayout
    from mcore_lab.layout.rules.case import ModelShape

Where = Literal["embedding", "attention", "mlp", "experts", "output"]

_MLA_DEFAULTS = {
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}
"""Megatron-Core's `MLATransformerConfig`."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Rows or columns that one part holds: from the first to before the last, counted from 0."""

    first: int
    end: int
    part: int
    """The rank in the dimension that the matrix is cut by."""


@dataclass(frozen=True, kw_only=True)
class MatrixCut:
    """One matrix, and how it is spread over ranks."""

    where: Where
    """Which part of the model it is of."""
    name: str
    """Megatron-Core's, within the model or the layer."""
    what: str
    """What it does, in words."""
    rows: int
    """Outputs; a matrix is stored as `[rows, columns]`."""
    columns: int
    """Inputs; 0 of a vector."""
    by: Literal["tp", "etp"] = "tp"
    """The dimension whose ranks share it."""
    axis: Literal[0, 1] | None = None
    """What they share: its rows, its columns, or None where each has all of it."""
    bands: tuple[Band, ...] = ()
    """Who has which of them, in order; none where each has all of it."""
    experts: int = 0
    """How many such matrices there are, whole ones over the ranks of ep; 0 if it is no expert's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole."""
        return (self.rows, self.columns) if self.columns else (self.rows,)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Return the shape of the part of each rank."""
        shape = list(self.shape)
        if self.axis is not None:
            shape[self.axis] = sum(b.end - b.first for b in self.bands if b.part == 0)
        return tuple(shape)

    def held(self, part: int) -> tuple[tuple[int, int], ...]:
        """Return which rows or columns a part holds; all of them where nothing is cut."""
        if self.axis is None:
            return ((0, self.rows),)
        return tuple((band.first, band.end) for band in self.bands if band.part == part)


def matrix_cuts(
    layout: ParallelLayout,
    model: ModelShape,
    vocab_size: int,
    sequence_length: int,
    backend: str = "torch",
) -> list[MatrixCut]:
    """Return the matrices of a model, of its layers once, and how this layout cuts them.

    The layout must break no rule. `vocab_size` and `sequence_length` are of the embeddings where
    the model does not say; `backend` is what layers are built of, `torch` or `te`. Biases follow
    their matrix: cut where its rows are, whole where its columns are. What further fields of
    `TransformerConfig` add (latent experts, gated attention, multi-token prediction) is left out.
    """
    return list(_Matrices(layout, model, backend).all(vocab_size, sequence_length))


class _Matrices:
    def __init__(self, layout: ParallelLayout, model: ModelShape, backend: str) -> None:
        self._layout, self._model, self._backend = layout, model, backend
        self._fields: Mapping[str, Any] = model.transformer
        self._hidden = model.hidden_size

    def all(self, vocab_size: int, sequence_length: int) -> Iterator[MatrixCut]:
        model, hidden = self._model, self._hidden
        vocabulary = model.vocab_size or vocab_size
        name = "word_embeddings.weight"
        yield self._rows("embedding", name, "a row for each token", vocabulary)
        if getattr(model, "position_embedding_type", "") == "learned_absolute":
            longest = model.max_sequence_length or sequence_length
            yield self._whole(
                "embedding", "position_embeddings.weight", "a row for each position", longest
            )
        yield self._norm("attention", "input_layernorm.weight", "before attention")
        yield from self._latent() if self._of("multi_latent_attention") else self._attention()
        yield self._norm("mlp", "pre_mlp_layernorm.weight", "before the feed-forward layer")
        if self._has_dense_layers():
            yield from self._feed_forward()
        if model.num_moe_experts:
            yield from self._experts(model.num_moe_experts)
        yield self._norm("output", "final_layernorm.weight", "after the last layer")
        tied = getattr(model, "share_embeddings_and_output_weights", False)
        what = "the embedding's own weight" if tied else "the logits of each token"
        yield self._rows("output", "output_layer.weight", what, vocabulary, hidden)

    def _attention(self) -> Iterator[MatrixCut]:
        heads = self._model.num_attention_heads
        groups = self._model.num_query_groups or heads
        channels = self._of("kv_channels") or self._hidden // heads
        what = "queries, keys, values of each query group"
        rows = (heads + 2 * groups) * channels
        yield self._rows("attention", "self_attention.linear_qkv.weight", what, rows)
        yield from self._head_norm("q", channels)
        yield from self._head_norm("k", channels)
        yield self._projection(heads * channels)

    def _latent(self) -> Iterator[MatrixCut]:
        """Yield multi-latent attention's."""
        size = {name: self._of(name, default) for name, default in _MLA_DEFAULTS.items()}
        heads = self._model.num_attention_heads
        queries = heads * (size["qk_head_dim"] + size["qk_pos_emb_head_dim"])
        latent, shared = size["kv_lora_rank"], size["qk_pos_emb_head_dim"]
        keys = heads * (size["qk_head_dim"] + size["v_head_dim"])
        prefix = "self_attention.linear_"
        if rank := size["q_lora_rank"]:
            what = "the latent of queries"
            yield self._down(f"{prefix}q_down_proj.weight", what, rank)
            yield from self._head_norm("q", rank)
            what = "queries, head by head"
            yield self._rows("attention", f"{prefix}q_up_proj.weight", what, queries, rank)
        else:
            yield self._rows("attention", f"{prefix}q_proj.weight", "queries", queries)
        what = "the latent of keys and values"
        name = f"{prefix}kv_down_proj.weight"
        yield self._down(name, what, latent + shared)
        yield from self._head_norm("kv", latent)
        what = "keys and values, head by head"
        yield self._rows("attention", f"{prefix}kv_up_proj.weight", what, keys, latent)
        yield self._projection(heads * size["v_head_dim"])

    def _head_norm(self, of: str, size: int) -> Iterator[MatrixCut]:
        """Yield the norm of queries or keys, or of their latents, where there is one."""
        if self._of("qk_layernorm"):
            yield self._norm("attention", f"self_attention.{of}_layernorm.weight", f"of {of}", size)

    def _down(self, name: str, what: str, rows: int) -> MatrixCut:
        """Return a projection to a latent, which Transformer Engine's layers have whole.

        Without it, it is cut, and the latents are gathered.
        """
        if self._backend == "te":
            return self._whole("attention", name, what, rows)
        return self._rows("attention", name, what, rows)

    def _projection(self, inputs: int) -> MatrixCut:
        name = "self_attention.linear_proj.weight"
        return self._columns("attention", name, "from the heads back", inputs)

    def _feed_forward(self) -> Iterator[MatrixCut]:
        yield self._up("mlp", "mlp.linear_fc1.weight", self._width)
        yield self._columns("mlp", "mlp.linear_fc2.weight", "and back", self._width)

    def _experts(self, experts: int) -> Iterator[MatrixCut]:
        width = self._of("moe_ffn_hidden_size") or self._width
        what = "a score for each expert"
        yield self._whole("experts", "mlp.router.weight", what, experts, self._hidden)
        more: Any = {"by": "etp", "experts": experts}
        yield self._up("experts", "mlp.experts.linear_fc1.weight", width, **more)
        yield self._columns("experts", "mlp.experts.linear_fc2.weight", "and back", width, **more)
        if shared := self._of("moe_shared_expert_intermediate_size"):
            prefix = "mlp.shared_experts.linear_fc"
            yield self._up("experts", f"{prefix}1.weight", shared)
            yield self._columns("experts", f"{prefix}2.weight", "and back", shared)

    @property
    def _width(self) -> int:
        return self._model.ffn_hidden_size or 4 * self._hidden

    def _has_dense_layers(self) -> bool:
        if not self._model.num_moe_experts:
            return True
        frequency = self._of("moe_layer_freq", 1)
        return 0 in frequency if isinstance(frequency, list | tuple) else frequency > 1

    def _of(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def _up(self, where: Where, name: str, width: int, **more: Any) -> MatrixCut:
        """Return a first feed-forward matrix; a gated unit's two halves are each cut for itself."""
        if not self._of("gated_linear_unit"):
            return self._rows(where, name, "to the width of the layer", width, **more)
        what = "to the width of the layer: gate, then values"
        return self._rows(where, name, what, 2 * width, sections=2, **more)

    def _rows(
        self,
        where: Where,
        name: str,
        what: str,
        rows: int,
        columns: int = 0,
        *,
        sections: int = 1,
        **more: Any,
    ) -> MatrixCut:
        shape: Any = {"rows": rows, "columns": columns or self._hidden}
        cut = self._cut(0, rows, sections, more.get("by", "tp"))
        return MatrixCut(where=where, name=name, what=what, **shape, **cut, **more)

    def _columns(self, where: Where, name: str, what: str, columns: int, **more: Any) -> MatrixCut:
        shape: Any = {"rows": self._hidden, "columns": columns}
        cut = self._cut(1, columns, 1, more.get("by", "tp"))
        return MatrixCut(where=where, name=name, what=what, **shape, **cut, **more)

    def _cut(self, axis: int, length: int, sections: int, by: str) -> dict[str, Any]:
        parts = getattr(self._layout, by)
        if parts == 1:
            return {}
        size = length // sections // parts
        bands = tuple(
            Band(first=number * size, end=(number + 1) * size, part=number % parts)
            for number in range(sections * parts)
        )
        return {"axis": axis, "bands": bands}

    def _whole(self, where: Where, name: str, what: str, rows: int, columns: int = 0) -> MatrixCut:
        return MatrixCut(
            where=where, name=name, what=what, rows=rows, columns=columns or self._hidden
        )

    def _norm(self, where: Where, name: str, what: str, size: int = 0) -> MatrixCut:
        rows = size or self._hidden
        return MatrixCut(where=where, name=name, what=f"norm {what}", rows=rows, columns=0)
