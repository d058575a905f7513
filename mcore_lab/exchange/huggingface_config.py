"""`config.json` of Hugging Face's Llama and Mixtral, to and from a recipe's model. No torch.

Fields that it lacks have the values that `transformers` gives them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mcore_lab.config import Model
from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.huggingface_names import Heads
from mcore_lab.exchange.naming import in_a_line

CONFIG = "config.json"

_NEEDED = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "activation_func": ("silu", "gelu"),
    "gated_linear_unit": (True, False),
    "add_bias_linear": (False, True),
}
"""Fields of `TransformerConfig`: what they have to be, and what they are if they are not set."""
_CARRIED = ("layernorm_epsilon", "kv_channels", "moe_router_topk", "moe_ffn_hidden_size")
_OFF = {
    "softmax_type": "vanilla",
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
}
"""What turns a field off, where that is not None, False or 0."""
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
"""Ways to balance experts that leave the router's choice as it is."""
_SAME_FUNCTION = re.compile(
    r"\w+_dropout|\w*init_method_std|recompute_\w+|\w+_fusion|overlap_\w+|tp_comm_\w+|batch_p2p_\w+"
    r"|cp_comm_type|attention_backend|attention_softmax_in_fp32|fp32_residual_connection"
    r"|moe_(token_dispatcher_type|grouped_gemm|aux_loss_coeff|z_loss_coeff|router_dtype)"
    r"|num_layers_in_(first|last)_pipeline_stage|account_for_\w+|pipeline_model_parallel_layout"
    r"|variable_seq_lengths|deterministic_mode|perform_initialization|persist_layer_norm"
)
"""Fields of how a model is trained, split and computed, and not of what it computes."""
_MODEL_FIELDS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "causal_attention": True,
    "rotary_percent": 1.0,
    "rope_scaling": False,
    "seq_len_interpolation_factor": None,
}
_EXPERTS = {
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
}


def family(model: Model) -> str:
    """Return which of Hugging Face's models it would be: `Llama` or `Mixtral`."""
    return "Mixtral" if model.num_moe_experts else "Llama"


def misfits(model: Model) -> list[str]:
    """Return, a line each, what the model has that Hugging Face's Llama or Mixtral has not."""
    name = family(model)
    found = [
        f"model.{field} is {value!r}, and that of a {name} is {needed!r}"
        for field, needed in _MODEL_FIELDS.items()
        if (value := getattr(model, field)) != needed
    ]
    given = model.transformer
    for field, (needed, default) in _NEEDED.items():
        if (value := given.get(field, default)) != needed:
            found.append(f"model.transformer.{field} is {value!r}, and that of a {name} {needed!r}")
    return found + [
        f"model.transformer.{field} is {value!r}, which no {name} has"
        for field, value in given.items()
        if value and not _fits(field, value)
    ]


def _fits(field: str, value: Any) -> bool:
    if field == "moe_router_load_balancing_type":
        kinds = value if isinstance(value, list | tuple) else [value]
        return all(kind in _BALANCING for kind in kinds)
    known = field in _NEEDED or field in _CARRIED or _SAME_FUNCTION.fullmatch(field)
    return bool(known) or _OFF.get(field) == value


def heads_of(model: Model) -> Heads:
    """Return how the rows of a model's `linear_qkv` are shared by heads."""
    heads = model.num_attention_heads
    channels = model.transformer.get("kv_channels") or model.hidden_size // heads
    return Heads(heads, model.num_query_groups or heads, channels)


def config_of(model: Model, *, vocab_size: int, max_sequence_length: int, dtype: str) -> str:
    """Return the `config.json` of a model without `misfits`, with `vocab_size` embeddings."""
    heads, given = heads_of(model), model.transformer
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    config: dict[str, Any] = {
        "architectures": [f"{family(model)}ForCausalLM"],
        "model_type": family(model).lower(),
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": ffn,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.groups,
        "head_dim": heads.channels,
        "hidden_act": "silu",
        "max_position_embeddings": max_sequence_length,
        "rms_norm_eps": given.get("layernorm_epsilon", 1e-5),
        "rope_theta": float(model.rotary_base),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        # Which tokens these are the data knows, and not the model; transformers would guess.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not model.num_moe_experts:
        return _text(config | {"mlp_bias": False})
    kind = given.get("moe_router_load_balancing_type", "aux_loss")
    loss = given.get("moe_aux_loss_coeff", 0.0) if kind == "aux_loss" else 0.0
    return _text(
        config
        | {
            "intermediate_size": given.get("moe_ffn_hidden_size") or ffn,
            "num_local_experts": model.num_moe_experts,
            "num_experts_per_tok": given.get("moe_router_topk", 2),
            "sliding_window": None,
            "output_router_logits": loss != 0,
            "router_aux_loss_coef": loss,
        }
    )


def model_of(config: Mapping[str, Any]) -> Model:
    """Return the model that a `config.json` describes.

    Raises CheckpointError if it is neither a Llama nor a Mixtral, or has what Megatron-Core's model
    has not, and if a size is missing.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mixtral"):
        raise CheckpointError(f"model_type is {kind!r}; there is 'llama' and 'mixtral'")
    if found := list(_unlike(config)):
        raise CheckpointError(in_a_line(found))
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    channels = _size(config, "head_dim", hidden // heads)
    transformer: dict[str, Any] = {field: needed for field, (needed, _) in _NEEDED.items()}
    transformer |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    transformer["layernorm_epsilon"] = config.get("rms_norm_eps", _by_kind(kind, 1e-6, 1e-5))
    if channels * heads != hidden:
        transformer["kv_channels"] = channels
    if kind == "mixtral":
        transformer |= _EXPERTS | {"moe_router_topk": _size(config, "num_experts_per_tok", 2)}
        if config.get("output_router_logits"):
            coefficient = config.get("router_aux_loss_coef", 0.001)
            transformer["moe_router_load_balancing_type"] = "aux_loss"
            transformer["moe_aux_loss_coeff"] = coefficient
    return Model(
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", _by_kind(kind, heads, 8)),
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_moe_experts=_size(config, "num_local_experts", 8) if kind == "mixtral" else None,
        vocab_size=_size(config, "vocab_size"),
        max_sequence_length=_size(config, "max_position_embeddings"),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        rotary_base=int(_rotary_base(config)),
        transformer=transformer,
    )


def dtype_of(config: Mapping[str, Any]) -> str | None:
    """Return the type of numbers that a `config.json` names, if it does."""
    name = config.get("dtype") or config.get("torch_dtype")
    return None if name is None else str(name)


def _unlike(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a Llama or Mixtral may be told to have that Megatron-Core's model has not."""
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {config['hidden_act']!r}, and not 'silu'"
    for name in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if value := config.get(name):
            yield f"{name} is {value!r}, which cannot be imported"
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor is {config['partial_rotary_factor']!r}, and not 1.0"
    for name in ("rope_scaling", "rope_parameters"):
        scaling = config.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            yield f"{name} is of the type {kind!r}, which cannot be imported"
    if not float(_rotary_base(config)).is_integer():
        yield f"rope_theta is {_rotary_base(config)!r}, and not a whole number"


def _rotary_base(config: Mapping[str, Any]) -> float:
    named: Mapping[str, Any] = config.get("rope_parameters") or config
    default = _by_kind(config["model_type"], 1e4, 1e6)
    return named.get("rope_theta") or config.get("rope_theta") or default


def _by_kind(kind: str, llama: Any, mixtral: Any) -> Any:
    return llama if kind == "llama" else mixtral


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{name} is {value!r}, and has to be a whole number of 1 or more")
    return value


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"
