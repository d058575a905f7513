"""The command line's overrides, and what is said of those that cannot be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mcore_lab.config import (
    LaunchSettings,
    Model,
    Recipe,
    RunArguments,
    Training,
    parse_recipe,
    parse_recipe_or_exit,
)
from mcore_lab.errors import ConfigError
from mcore_lab.layout import SHORT_NAMES, ParallelLayout

BASE = Recipe(name="tp2_gpt", layout=ParallelLayout(tensor_model_parallel_size=2))


def parse(*words: str, base: Recipe = BASE) -> RunArguments:
    return parse_recipe(base, words, "mcore-lab run tp2_gpt", LaunchSettings)


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    return str(caught.value)


@pytest.mark.parametrize("short", SHORT_NAMES)
def test_a_layout_size_is_set_by_its_bare_its_short_and_its_long_name(short: str) -> None:
    long = SHORT_NAMES[short]
    value = True if short == "sp" else 4
    expected = dataclasses.replace(BASE.layout, **{long: value})
    for option in (f"--{short}", f"--layout.{short}", f"--layout.{long.replace('_', '-')}"):
        assert parse(option, str(value)).recipe.layout == expected
        assert parse(f"{option}={value}").recipe.layout == expected


def test_dashes_and_underscores_are_the_same() -> None:
    assert parse("--model.num_layers", "7") == parse("--model.num-layers", "7")
    assert parse("--model.num_layers=7").recipe.model.num_layers == 7


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--layout.sp"], True),
        (["--sp"], True),
        (["--layout.sp", "True"], True),
        (["--layout.sp", "true"], True),
        (["--layout.no-sp"], False),
        (["--no-sp"], False),
        (["--layout.no-sequence-parallel"], False),
        (["--layout.no_sequence_parallel"], False),
        (["--layout.sp", "False"], False),
        (["--layout.sp=false"], False),
    ],
)
def test_a_switch_takes_every_usual_form(words: list[str], value: bool) -> None:
    base = BASE.with_layout(sequence_parallel=not value)
    assert parse(*words, base=base).recipe.layout.sequence_parallel is value


def test_a_switch_does_not_take_the_option_that_follows_it() -> None:
    arguments = parse("--sp", "--tp", "4", "--fresh", "--model.parallel-output", "False", "--json")
    assert arguments.recipe.layout == ParallelLayout(
        tensor_model_parallel_size=4, sequence_parallel=True
    )
    assert arguments.recipe.model.parallel_output is False
    assert arguments.fresh and arguments.json


def test_numbers_are_read_as_the_field_has_them() -> None:
    training = parse("--training.lr", "3e-4", "--training.min-lr", "1", "--training.steps", "5")
    assert training.recipe.training == dataclasses.replace(
        BASE.training, lr=3e-4, min_lr=1.0, steps=5
    )
    assert type(training.recipe.training.min_lr) is float


def test_none_unsets_a_field() -> None:
    base = dataclasses.replace(BASE, model=Model(ffn_hidden_size=128))
    assert parse("--model.ffn-hidden-size", "None", base=base).recipe.model.ffn_hidden_size is None


def test_how_to_run_is_apart_from_the_recipe() -> None:
    plain = parse()
    assert plain == RunArguments(recipe=BASE, run_dir=Path("runs/tp2_gpt"))
    told = parse("--run-dir", "elsewhere", "--fresh", "--json", "--nproc", "4")
    assert told == RunArguments(
        recipe=BASE, run_dir=Path("elsewhere"), fresh=True, json=True, nproc=4
    )


def test_under_torchrun_there_is_no_nproc_option() -> None:
    with pytest.raises(ConfigError, match="unknown option --nproc"):
        parse_recipe(BASE, ["--nproc", "2"], "python -m mcore_lab.recipes.tp2_gpt")


def test_all_unknown_options_are_told_with_the_near_ones() -> None:
    assert refusal("--model.num-layer", "3", "--tpp", "2", "--lr", "1").splitlines() == [
        "unknown option --model.num-layer; did you mean --model.num-layers or "
        "--model.num-moe-experts?",
        "unknown option --tpp; did you mean --tp or --pp?",
        "unknown option --lr; did you mean --training.lr?",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tp x", "--layout.tensor-model-parallel-size expects a whole number; got x"),
        ("--tp 2 3", "--layout.tensor-model-parallel-size expects a whole number; got 2 3"),
        ("--tp", "--layout.tensor-model-parallel-size expects a whole number; got nothing"),
        ("--training.lr fast", "--training.lr expects a number; got fast"),
        ("--layout.sp maybe", "--layout.sequence-parallel expects True or False; got maybe"),
        ("--model.vocab-size 1.5", "--model.vocab-size expects a whole number or None; got 1.5"),
        (
            "--training.lr-decay-style cosin",
            "--training.lr-decay-style expects one of constant, linear, cosine, "
            "inverse-square-root, WSD; got cosin; did you mean cosine?",
        ),
        ("stray --tp 2", "unexpected argument stray"),
        ("2", "unexpected argument 2; did you mean --nproc 2?"),
        ("--config nowhere.toml", "nowhere.toml: No such file or directory"),
    ],
)
def test_a_value_that_does_not_fit_is_told_in_one_line(words: str, message: str) -> None:
    assert refusal(*words.split()) == message


def test_help_shows_the_recipes_own_values_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert left.value.code == 0
    assert "--layout.tp INT, --tp INT, --layout.tensor-model-parallel-size INT" in shown
    assert "Ranks that split each weight matrix. (default: 2)" in shown
    assert "recipes --transformer-fields" in shown
    assert "add-bias-linear" not in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(("rank", "told"), [(None, True), ("0", True), ("1", False)])
def test_only_rank_0_tells_the_error(
    rank: str | None,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    # The others give rank 0 this long to come to its word.
    monkeypatch.setattr("mcore_lab.config.arguments._TELLING_SECONDS", 0.1)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        parse_recipe_or_exit(BASE, ["--tp", "x"])
    assert left.value.code == 2
    assert ("error: --layout.tensor-model-parallel-size" in capsys.readouterr().err) is told


def test_any_field_of_transformer_config_can_be_set() -> None:
    model = parse(
        *("--model.transformer.add-bias-linear", "False"),
        *("--model.transformer.window_size", "-1", "0"),
        *("--model.transformer.moe-layer-freq", "0", "1", "1"),
        *("--model.transformer.moe-router-load-balancing-type", "sinkhorn"),
        *("--model.transformer.activation-func", "silu"),
        *("--model.transformer.attention-backend", "flash"),
        *("--model.transformer.autocast-dtype", "bfloat16"),
        *("--model.transformer.layernorm-epsilon", "1e-6"),
        *("--model.transformer.fp4-recipe", "None"),
        "--model.transformer.gated-linear-unit",
        "--model.transformer.no-bias-dropout-fusion",
    ).recipe.model
    assert model == Model(
        transformer={
            "add_bias_linear": False,
            "window_size": (-1, 0),
            "moe_layer_freq": [0, 1, 1],
            "moe_router_load_balancing_type": "sinkhorn",
            "activation_func": "silu",
            "attention_backend": "flash",
            "autocast_dtype": "bfloat16",
            "layernorm_epsilon": 1e-6,
            "fp4_recipe": None,
            "gated_linear_unit": True,
            "bias_dropout_fusion": False,
        }
    )


def test_given_fields_are_added_to_the_recipes() -> None:
    base = dataclasses.replace(
        BASE, model=Model(transformer={"qk_layernorm": True, "add_bias_linear": True})
    )
    model = parse("--model.transformer.add-bias-linear", "False", base=base).recipe.model
    assert model.transformer == {"qk_layernorm": True, "add_bias_linear": False}
    assert base.model.transformer["add_bias_linear"] is True


def test_a_field_that_the_model_has_itself_is_set_there() -> None:
    model = parse("--model.transformer.num-layers", "7").recipe.model
    assert model == Model(num_layers=7)


def test_an_unknown_field_lists_the_near_ones() -> None:
    assert refusal("--model.transformer.add-bias-liner", "False").startswith(
        "--model.transformer.add-bias-liner is not a field of the installed TransformerConfig; "
        "did you mean add_bias_linear or "
    )


@pytest.mark.parametrize("field", ["class", "3x", "_x", "a.b", "FP8", ""])
def test_what_cannot_be_a_field_is_an_unknown_option(field: str) -> None:
    assert refusal(f"--model.transformer.{field}", "3").startswith("unknown option --model.trans")


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("tensor_model_parallel_size", "layout.tensor_model_parallel_size"),
        ("sequence_parallel", "layout.sequence_parallel"),
        ("bf16", "training.precision"),
    ],
)
def test_a_field_that_follows_from_another_setting_is_refused(field: str, instead: str) -> None:
    said = refusal(f"--model.transformer.{field}", "2")
    assert said.endswith(f"follows from {instead}; set that instead")


def test_fields_of_latent_attention_need_latent_attention() -> None:
    assert "set model.transformer.multi_latent_attention to True" in refusal(
        "--model.transformer.kv-lora-rank", "8"
    )
    words = ["--model.transformer.kv-lora-rank", "8", "--model.transformer.multi-latent-attention"]
    transformer = parse(*words).recipe.model.transformer
    assert transformer == {"kv_lora_rank": 8, "multi_latent_attention": True}


def test_fields_of_the_gradient_buffers_and_of_the_optimizer_can_be_set() -> None:
    training = parse(
        *("--training.ddp.overlap-grad-reduce", "--training.ddp.bucket-size", "1000"),
        *("--training.ddp.no-grad-reduce-in-fp32", "--training.optimizer.optimizer", "sgd"),
        *("--training.optimizer.sgd-momentum", "0.5", "--training.optimizer.main-grads-dtype"),
        *("bfloat16", "--training.optimizer.no-decoupled-weight-decay"),
    ).recipe.training
    assert training == Training(
        ddp={"overlap_grad_reduce": True, "bucket_size": 1000, "grad_reduce_in_fp32": False},
        optimizer={
            "optimizer": "sgd",
            "sgd_momentum": 0.5,
            "main_grads_dtype": "bfloat16",
            "decoupled_weight_decay": False,
        },
    )


def test_what_training_has_itself_is_set_there() -> None:
    assert parse("--training.optimizer.adam-beta2", "0.95").recipe.training == Training(
        adam_beta2=0.95
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--training.ddp.overlap-grad-reduc True",
            "is not a field of the installed DistributedDataParallelConfig; did you mean overlap_",
        ),
        ("--training.ddp.use-distributed-optimizer", "follows from layout.use_distributed_opt"),
        ("--training.optimizer.bf16", "follows from training.precision"),
        (
            "--training.optimizer.overlap-param-gather",
            "follows from training.ddp.overlap_param_gather",
        ),
        ("--training.optimizer.sgd-momentum x", "expects a number; got x"),
    ],
)
def test_what_these_tables_may_not_hold_is_told_in_one_line(words: str, said: str) -> None:
    assert said in refusal(*words.split())
