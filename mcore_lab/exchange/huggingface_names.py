"""Hugging Face's names of the tensors of a Llama or a Mixtral. No torch in here.

Megatron-Core has the projections of query, key and value in one matrix, group by group: the queries
of a group, its key, its value. Gate and up projection are one matrix too, the gate's rows first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.naming import Named, Shape

_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_OF_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "block_sparse_moe.gate.weight",
}
"""Transformer Engine's layers and others name the norms differently."""
_QKV = "self_attention.linear_qkv.weight"
_FC1 = "mlp.linear_fc1.weight"
_EXPERTS = "mlp.experts.experts."
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")


@dataclass(frozen=True)
class Heads:
    """How the rows of `linear_qkv` are shared by heads."""

    query: int
    """Attention heads."""
    groups: int
    """Key/value heads."""
    channels: int
    """Of each head."""

    def rows(self) -> dict[str, tuple[range, ...]]:
        """Return the rows of each projection, in the order of heads."""
        queries = self.query // self.groups * self.channels
        group = queries + 2 * self.channels
        parts = {"q": (0, queries), "k": (queries, group - self.channels)}
        parts["v"] = (group - self.channels, group)
        return {
            name: tuple(range(at + start, at + stop) for at in range(0, self.groups * group, group))
            for name, (start, stop) in parts.items()
        }


def huggingface_names(tensors: Mapping[str, Shape], heads: Heads) -> list[Named]:
    """Return every tensor under its name in Hugging Face's Llama, or Mixtral if it is of experts.

    Raises CheckpointError for a tensor that neither has.
    """
    return [named for key, shape in tensors.items() for named in _named(key, shape, heads)]


def _named(key: str, shape: Shape, heads: Heads) -> Iterator[Named]:
    match = _LAYER.fullmatch(key)
    if match is None:
        if key not in _WHOLE:
            raise CheckpointError(f"{key} is of no tensor that Hugging Face's Llama or Mixtral has")
        yield Named.part_of(key, shape, _WHOLE[key])
    elif match[1]:
        yield from _of_layer(key, shape, (), int(match[1]), match[2], heads)
    else:
        for layer in range(shape[0]):
            yield from _of_layer(key, shape, (layer,), layer, match[2], heads)


def _of_layer(
    key: str, shape: Shape, index: tuple[int, ...], layer: int, what: str, heads: Heads
) -> Iterator[Named]:
    inside = f"model.layers.{layer}"
    sides = shape[len(index) :]
    if what in _OF_LAYER:
        yield Named.part_of(key, shape, f"{inside}.{_OF_LAYER[what]}", index)
    elif what == _QKV:
        for name, rows in heads.rows().items():
            yield Named.part_of(key, shape, f"{inside}.self_attn.{name}_proj.weight", index, rows)
    elif what == _FC1:
        for name, rows in _halves(sides[0], "gate_proj", "up_proj"):
            yield Named.part_of(key, shape, f"{inside}.mlp.{name}.weight", index, rows)
    elif what in (f"{_EXPERTS}linear_fc1.weight", f"{_EXPERTS}linear_fc2.weight"):
        for expert in range(sides[0]):
            name, at = f"{inside}.block_sparse_moe.experts.{expert}", (*index, expert)
            if what.endswith("fc2.weight"):
                yield Named.part_of(key, shape, f"{name}.w2.weight", at)
                continue
            for half, rows in _halves(sides[1], "w1", "w3"):
                yield Named.part_of(key, shape, f"{name}.{half}.weight", at, rows)
    else:
        raise CheckpointError(f"{key} is of no tensor that Hugging Face's Llama or Mixtral has")


def _halves(rows: int, first: str, second: str) -> Iterator[tuple[str, tuple[range, ...]]]:
    yield first, (range(rows // 2),)
    yield second, (range(rows // 2, rows),)
