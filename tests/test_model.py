"""What a recipe says of its model is what Megatron-Core is given."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import SMALL, changed, run

from mcore_lab import cpu
from mcore_lab.config import Recipe, parse_recipe
from mcore_lab.errors import ConfigError
from mcore_lab.recipes import load_recipe

cpu.preload()

from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

from mcore_lab.model import (  # noqa: E402
    configuration,
    gpt_arguments,
    model_vocab_size,
    transformer_config,
)


def recipe_of(*words: str) -> Recipe:
    return parse_recipe(load_recipe("tp2_gpt"), words, "prog").recipe


def from_toml(folder: Path, text: str) -> Recipe:
    (folder / "own.toml").write_text(text)
    return recipe_of("--config", str(folder / "own.toml"))


class Speed(enum.Enum):
    slow = 1
    fast = 2


@dataclasses.dataclass(kw_only=True)
class AnyConfig:
    """As Megatron-Core's are: with enums, dtypes, and either of an enum and text."""

    speed: Speed | None = None
    exact: Speed = Speed.fast
    text_or_speed: str | Speed = "slow"
    kind: torch.dtype | None = None


FIELDS: list[tuple[Sequence[str], dict[str, Any]]] = [
    (["attention-dropout", "0.25"], {"attention_dropout": 0.25, "hidden_dropout": 0.0}),
    (["activation-func", "silu"], {"activation_func": F.silu}),
    (["activation-func", "squared_relu"], {"activation_func": squared_relu}),
    (["gated-linear-unit", "True"], {"gated_linear_unit": True}),
    (["normalization", "RMSNorm"], {"normalization": "RMSNorm"}),
    (["layernorm-epsilon", "1e-6"], {"layernorm_epsilon": 1e-6}),
    (["attention-backend", "unfused"], {"attention_backend": AttnBackend.unfused}),
    (["num-query-groups", "2"], {"num_query_groups": 2}),
    (["kv-channels", "64"], {"kv_channels": 64}),
    (["qk-layernorm", "True"], {"qk_layernorm": True}),
    (["window-size", "16", "0"], {"window_size": (16, 0)}),
    (["pipeline-dtype", "float16"], {"pipeline_dtype": torch.float16}),
    (["calculate-per-token-loss", "False"], {"calculate_per_token_loss": False}),
]


@pytest.mark.parametrize(
    ("words", "expected"), FIELDS, ids=[" ".join(words) for words, _ in FIELDS]
)
def test_a_field_that_is_set_arrives(words: Sequence[str], expected: dict[str, Any]) -> None:
    field, *values = words
    config = transformer_config(recipe_of(f"--model.transformer.{field}", *values))
    assert {name: getattr(config, name) for name in expected} == expected


def test_fields_of_toml_arrive(tmp_path: Path) -> None:
    recipe = from_toml(
        tmp_path,
        'name = "tp2_gpt"\n[model]\nnum_query_groups = 2\n[model.transformer]\n'
        'activation_func = "silu"\nattention_backend = "unfused"\nwindow_size = [16, 0]\n',
    )
    config = transformer_config(recipe)
    assert config.num_query_groups == 2
    assert config.activation_func is F.silu
    assert config.attention_backend is AttnBackend.unfused
    assert config.window_size == (16, 0)


def test_shape_layout_and_precision_arrive() -> None:
    words = ["--tp", "4", "--sp", "--pp", "2", "--training.precision", "bf16"]
    shape = ["--model.num-layers", "6", "--model.ffn-hidden-size", "96"]
    config = transformer_config(recipe_of(*words, *shape))
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (6, 512, 96)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (4, 2)
    assert config.sequence_parallel is True
    assert config.bf16 and config.params_dtype is config.pipeline_dtype is torch.bfloat16


def test_interleaving_is_given_the_communication_that_it_needs() -> None:
    config = transformer_config(recipe_of("--pp", "2", "--vpp", "2", "--model.num-layers", "4"))
    assert config.overlap_p2p_comm is True and config.batch_p2p_comm is False


def test_every_token_weighs_the_same_by_default() -> None:
    assert transformer_config(recipe_of()).calculate_per_token_loss is True


def test_latent_attention_has_a_configuration_of_its_own() -> None:
    words = ["--model.transformer.multi-latent-attention", "True"]
    config = transformer_config(recipe_of(*words, "--model.transformer.kv-lora-rank", "32"))
    assert type(config).__name__ == "MLATransformerConfig"
    assert config.kv_lora_rank == 32


def test_rotary_embeddings_of_latent_attention_are_those_of_the_recipe() -> None:
    latent = ["--model.transformer.multi-latent-attention", "--model.rotary-base", "500"]
    config = transformer_config(recipe_of(*latent, "--model.transformer.rotary-percent", "0.5"))
    assert (config.rotary_base, config.rotary_percent) == (500, 0.5)


def test_names_that_no_field_has_are_refused_with_those_that_there_are() -> None:
    own = SMALL.model.transformer
    for fields, message in (
        ({"attention_backend": "fast"}, "attention_backend 'fast' is none of flash, fused, unf"),
        ({"pipeline_dtype": "float8"}, "pipeline_dtype 'float8' is none of float32, bfloat16, fl"),
        ({"activation_func": "tanh"}, "activation_func 'tanh' is none of gelu, quick_gelu, relu"),
    ):
        with pytest.raises(ConfigError, match=message):
            transformer_config(changed(SMALL, model={"transformer": own | fields}))


def test_any_enum_s_members_go_by_their_names() -> None:
    plain = {"speed": "slow", "exact": "fast", "text_or_speed": "fast", "kind": "bfloat16"}
    assert configuration(AnyConfig, {"of_another_version": 1}, plain) == AnyConfig(
        speed=Speed.slow, exact=Speed.fast, text_or_speed="fast", kind=torch.bfloat16
    )
    with pytest.raises(ConfigError, match="speed 'swift' is none of slow, fast"):
        configuration(AnyConfig, {}, {"speed": "swift"})


def test_plain_arguments_of_gpt_model_arrive() -> None:
    rotary = ["--model.position-embedding-type", "rope", "--model.rotary-percent", "0.5"]
    output = ["--model.no-parallel-output", "--model.share-embeddings-and-output-weights"]
    arguments = gpt_arguments(recipe_of(*rotary, *output), 65)
    assert arguments["position_embedding_type"] == "rope"
    assert arguments["rotary_percent"] == 0.5
    assert arguments["parallel_output"] is False
    assert arguments["share_embeddings_and_output_weights"] is True
    assert arguments["vocab_size"] == 100
    assert arguments["max_sequence_length"] == 64


@pytest.mark.parametrize(
    ("words", "needed", "rows"),
    [
        (["--model.vocab-size", "100"], 65, 100),
        (["--model.vocab-size", "None"], 65, 128),
        (["--model.vocab-size", "None"], 256, 256),
        (["--model.vocab-size", "None"], 257, 384),
        (["--model.vocab-size", "None", "--tp", "3"], 65, 384),
    ],
)
def test_the_embedding_has_rows_for_all_tokens_and_ranks(
    words: Sequence[str], needed: int, rows: int
) -> None:
    assert model_vocab_size(recipe_of(*words), needed) == rows


REFUSED = {
    "more groups than heads": ["--model.num-query-groups", "3"],
    "an impossible fusion": [
        *["--model.transformer.bias-activation-fusion", "True"],
        *["--model.transformer.activation-func", "relu"],
    ],
    "a recomputation without a method": [
        *["--model.transformer.recompute-granularity", "full"],
    ],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=list(REFUSED))
def test_what_megatron_core_refuses_is_one_line_with_its_reason(words: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        transformer_config(recipe_of(*words))
    message = str(raised.value)
    assert message.startswith("Megatron-Core refuses the model: ")
    assert "\n" not in message and len(message) > len("Megatron-Core refuses the model: ") + 10


def test_what_it_refuses_while_it_builds_is_one_line_too(tmp_path: Path) -> None:
    zero_centred = SMALL.model.transformer | {"layernorm_zero_centered_gamma": True}
    with pytest.raises(ConfigError) as raised:
        run(changed(SMALL, model={"transformer": zero_centred}), 1, tmp_path / "run")
    message = str(raised.value)
    assert message.startswith("Megatron-Core refuses the model: ")
    assert "no layernorm_zero_centered_gamma" in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_given_field_that_the_installed_version_has_not_is_refused() -> None:
    transformer = SMALL.model.transformer | {"add_bias_liner": False}
    with pytest.raises(ConfigError, match="not a field of the installed TransformerConfig; did yo"):
        transformer_config(changed(SMALL, model={"transformer": transformer}))
