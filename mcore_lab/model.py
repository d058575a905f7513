"""From a recipe to Megatron-Core's `TransformerConfig` and `GPTModel`'s arguments."""

from __future__ import annotations

import dataclasses
import enum
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import UnionType
from typing import (
    Any,
    NamedTuple,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from mcore_lab.backends import Backend, decoder_block_spec, mtp_block_spec
from mcore_lab.compat import DTYPES, router_coefficients
from mcore_lab.config import Recipe
from mcore_lab.errors import ConfigError, nearest
from mcore_lab.layout import ParallelLayout

_DIMENSIONS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "num_moe_experts",
)
_GPT_ARGUMENTS = (
    "parallel_output",
    "share_embeddings_and_output_weights",
    "position_embedding_type",
    "fp16_lm_cross_entropy",
    "rotary_percent",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "scatter_embedding_sequence_parallel",
    "seq_len_interpolation_factor",
)
_ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}
_VOCABULARY_MULTIPLE = 128

_Config = TypeVar("_Config")


class Stage(NamedTuple):
    """A part of the pipeline that this rank holds."""

    vp_stage: int | None
    """Which of this rank's chunks it is; None without interleaving."""
    is_first: bool
    """Whether it holds the embedding."""
    is_last: bool
    """Whether it holds the output layer and the loss."""


BuildChunk = Callable[[Recipe, TransformerConfig, Stage, Backend, int], torch.nn.Module]
"""Builds the part of a model that belongs to a stage of the pipeline: see `gpt_chunk`."""


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Return the recipe's `TransformerConfig`: its shape, the sizes of its layout, its precision.

    Raises ConfigError with Megatron-Core's own words for what it refuses.
    """
    model = recipe.model
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    fields: dict[str, Any] = {
        "use_cpu_initialization": True,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Each token of the global batch weighs the same, however it is cut into micro-batches and
        # ranks; averages of averages would not when masks differ.
        "calculate_per_token_loss": True,
        # The fused kernels are CUDA code.
        "masked_softmax_fusion": False,
    }
    if recipe.data.pack_documents and recipe.layout.pp > 1:
        # A row of packed documents is as long as their padding makes it: stages tell each other,
        # which Megatron-Core wants to know of the dispatcher, even where there are no experts.
        fields |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    fields |= {name: getattr(model, name) for name in _DIMENSIONS}
    fields |= recipe.layout.transformer_fields()
    given = dict(model.transformer)
    given |= router_coefficients(fields | given, recipe.data.micro_batch_size)
    if not given.get("multi_latent_attention"):
        return configuration(TransformerConfig, fields, given)
    # Its rotary embeddings are the layers' own, not `GPTModel`'s.
    fields |= {name: getattr(model, name) for name in ("rotary_base", "rotary_percent")}
    return configuration(MLATransformerConfig, fields, given)


def configuration(
    kind: type[_Config], fields: Mapping[str, Any], given: Mapping[str, Any]
) -> _Config:
    """Return one of Megatron-Core's configurations: `fields`, and over them what a recipe gives.

    Raises ConfigError for a given field that the installed version lacks, and with Megatron-Core's
    own words for what it refuses.
    """
    types = get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given.keys() - known:
        raise ConfigError(
            f"{name} is not a field of the installed {kind.__name__}{nearest(name, known)}"
        )
    values = {
        name: _value(name, value, types[name])
        for name, value in {**fields, **given}.items()
        if name in known
    }
    with refusals_explained():
        return kind(**values)


@contextmanager
def refusals_explained() -> Iterator[None]:
    """Raise what Megatron-Core refuses in a model as ConfigError, in its own words."""
    try:
        yield
    except (AssertionError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        # Where it says nothing, the condition that it asserts.
        condition = traceback.extract_tb(error.__traceback__)[-1].line
        reason = " ".join(str(error).split()) or condition
        raise ConfigError(f"Megatron-Core refuses the model: {reason}") from error


def _value(name: str, value: Any, annotation: Any) -> Any:
    """Turn the name of a function, a dtype or an enum's member into what the field takes."""
    kinds = _alternatives(annotation)
    if not isinstance(value, str) or str in kinds:
        return value
    named: Mapping[str, Any] = {m.name: m for kind in kinds if _is_enum(kind) for m in kind}
    if name == "activation_func":
        named = _ACTIVATIONS
    elif torch.dtype in kinds:
        named = {dtype: getattr(torch, dtype) for dtype in DTYPES}
    if named and value not in named:
        raise ConfigError(f"{name} {value!r} is none of {', '.join(named)}")
    return named.get(value, value)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_enum(kind: Any) -> TypeGuard[type[enum.Enum]]:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def gpt_arguments(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """Return `GPTModel`'s arguments that are the same on every rank."""
    model = recipe.model
    return {
        "vocab_size": model_vocab_size(recipe, vocab_size),
        "max_sequence_length": model.max_sequence_length or recipe.data.sequence_length,
        **{name: getattr(model, name) for name in _GPT_ARGUMENTS},
    }


def gpt_chunk(
    recipe: Recipe,
    config: TransformerConfig,
    stage: Stage,
    backend: Backend,
    vocab_size: int,
    block_spec: Any = None,
) -> torch.nn.Module:
    """Return the part of the recipe's GPT that belongs to a stage of the pipeline.

    `vocab_size` is what the data's tokenizer needs; `block_spec` takes the place of what
    `decoder_block_spec` returns. Initial weights are drawn from the generators
    that the caller has seeded.
    """
    if block_spec is None:
        causal = recipe.model.causal_attention
        block_spec = decoder_block_spec(config, backend, stage.vp_stage, causal=causal)
    return GPTModel(
        config,
        block_spec,
        **gpt_arguments(recipe, vocab_size),
        pre_process=stage.is_first,
        post_process=stage.is_last,
        mtp_block_spec=mtp_block_spec(config, backend, stage.vp_stage),
        vp_stage=stage.vp_stage,
    )


def model_vocab_size(recipe: Recipe, needed: int) -> int:
    """Return the embedding's rows: the model's own number, or what the tokenizer needs, rounded up.

    To a multiple of 128, as Megatron-LM does, and of the tensor-parallel size. Raises ConfigError
    when the model has fewer rows than the tokenizer has tokens.
    """
    multiple = math.lcm(_VOCABULARY_MULTIPLE, recipe.layout.tp)
    rounded = -(-needed // multiple) * multiple
    rows = recipe.model.vocab_size
    if rows is not None and rows < needed:
        raise ConfigError(
            f"the data's tokens need an embedding of {needed} rows, but the model has {rows}: "
            f"--model.vocab-size {rounded}"
        )
    return rows if rows is not None else rounded


def pipeline_stages(layout: ParallelLayout) -> list[Stage]:
    """Return the stages that this rank holds: one, or with interleaving one a virtual stage."""
    stages: list[int | None] = [None] if layout.vpp == 1 else list(range(layout.vpp))
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    return [
        Stage(
            vp_stage=stage,
            is_first=first(ignore_virtual=False, vp_stage=stage),
            is_last=last(ignore_virtual=False, vp_stage=stage),
        )
        for stage in stages
    ]


def on_device(config: TransformerConfig, chunk: torch.nn.Module) -> torch.nn.Module:
    """Put a chunk on this rank's device, under bf16 in Megatron-Core's wrapper for it."""
    chunk.cuda(torch.cuda.current_device())
    return Float16Module(config, chunk) if config.bf16 else chunk
