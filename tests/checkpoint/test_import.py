"""Weights from elsewhere become a checkpoint: the same numbers, for a run on any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanged import LLAMA, MIXTRAL, SAME, TOKENS, logits_of, with_fields
from safetensors.torch import load_file, save_file
from small_runs import SMALL, changed, run
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mcore_lab import cli
from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.export import export
from mcore_lab.exchange.huggingface_config import config_of, model_of
from mcore_lab.exchange.huggingface_names import Heads, huggingface_names
from mcore_lab.exchange.naming import differences
from mcore_lab.exchange.safetensors_read import SafetensorsFiles
from mcore_lab.recipes.carried import recipe_in
from mcore_lab.recipes.importing import recipe_of

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIG = SIZES | {"model_type": "llama"}
SEQUENTIAL = with_fields(MIXTRAL, moe_grouped_gemm=False)
MIXED = with_fields(changed(SMALL, model={"num_moe_experts": 2}), moe_layer_freq=2)
"""Every second layer is dense: layers that differ are not stacked in a checkpoint."""


def imported(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """Return what the command prints as JSON."""
    capsys.readouterr()
    assert cli.main(["checkpoint", "import", *map(str, words), "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def made_by_transformers(config: PretrainedConfig, folder: Path, **options: Any) -> PreTrainedModel:
    """Save a model with weights that are all drawn, norms too, and return it."""
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight in model.parameters():
        weight.data.normal_(1 if weight.ndim == 1 else 0, 0.1)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize(
    ("naming", "recipe", "layout"),
    [
        pytest.param("huggingface", LLAMA, {"tensor_model_parallel_size": 2}, id="llama"),
        pytest.param("megatron", MIXTRAL, {"pipeline_model_parallel_size": 2}, id="mixtral"),
        pytest.param("huggingface", SEQUENTIAL, {}, id="sequential"),
        pytest.param("megatron", MIXED, {}, id="no-llama"),
    ],
)
def test_what_was_exported_comes_back_bit_for_bit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    naming: str,
    recipe: Recipe,
    layout: dict[str, Any],
) -> None:
    ranks = 2 if layout else 1
    start = changed(recipe, layout=layout, training={"steps": 0})
    run(start, ranks, tmp_path / "run")
    words = [str(tmp_path / "run"), str(tmp_path / "out"), "--naming", naming]
    assert cli.main(["checkpoint", "export", *words]) == 0
    told = imported(capsys, tmp_path / "out", tmp_path / "back")
    assert told["nproc"] == (ranks if naming == "megatron" else 1) and told["rounded"] == []
    assert cli.main(["checkpoint", "verify", str(tmp_path / "back")]) == 0
    assert cli.main(["checkpoint", "diff", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert "tensors are the same, bit for bit" in capsys.readouterr().out
    if naming == "megatron":
        assert recipe_in(require_checkpoint(tmp_path / "back")) == start


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(**SIZES, rms_norm_eps=1e-4), id="llama"),
        pytest.param(LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True), id="tied"),
        pytest.param(MixtralConfig(**SIZES, num_local_experts=4), id="mixtral"),
    ],
)
def test_a_model_of_transformers_computes_the_same_logits_here_and_goes_back_as_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: PretrainedConfig
) -> None:
    model = made_by_transformers(config, tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    imported(capsys, tmp_path / "theirs", tmp_path / "ours")
    checkpoint = require_checkpoint(tmp_path / "ours")
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits_of(checkpoint, recipe_in(checkpoint)), theirs, **SAME)
    assert theirs.std() > 0.1

    export(checkpoint, tmp_path / "again", recipe_in(checkpoint))
    before, after = SafetensorsFiles(tmp_path / "theirs"), SafetensorsFiles(tmp_path / "again")
    assert before.shapes == after.shapes
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.shapes)


def test_a_run_begins_with_it_on_another_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by_transformers(LlamaConfig(**SIZES), tmp_path / "theirs")
    told = imported(capsys, tmp_path / "theirs", tmp_path / "ours", "--layout.tp", 2, "--nproc", 4)
    assert told["nproc"] == 4
    assert told["checkpoint"] == str(tmp_path / "ours" / "step-00000000")
    command = ["run", told["recipe"], "--nproc", "2", "--layout.tp", "1", "--layout.pp", "2"]
    command += ["--checkpoint.load", str(tmp_path / "ours"), "--training.steps", "1"]
    assert cli.main([*command, "--run-dir", str(tmp_path / "run"), "--json"]) == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["loss"] < 20


def test_numbers_that_precision_cannot_hold_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made_by_transformers(LlamaConfig(**SIZES), tmp_path / "theirs")
    precision = ("--training.precision", "bf16")
    told = imported(capsys, tmp_path / "theirs", tmp_path / "ours", *precision)
    names = set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert set(told["rounded"]) == names and "model.norm.weight" in names

    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert imported(capsys, tmp_path / "half", tmp_path / "halves")["rounded"] == []
    one, other = tmp_path / "ours", tmp_path / "halves"
    assert cli.main(["checkpoint", "diff", str(one), str(other)]) == 0
    assert recipe_in(require_checkpoint(other)).training.precision == "bf16"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file, with its config.json."""
    folder = tmp_path_factory.mktemp("files")
    made_by_transformers(LlamaConfig(**SIZES), folder)
    return folder


def changed_files(files: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Make a copy with other tensors, or without those that are None; `__` stands for a dot."""
    shutil.copytree(files, folder)
    there: dict[str, Any] = load_file(files / "model.safetensors")
    there |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in there.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_tensors_of_another_model_are_named_and_leave_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed_files(
        files,
        tmp_path / "other",
        model__norm__weight=None,
        model__embed_tokens__weight=torch.zeros(128, 16),
        model__surplus=torch.zeros(1),
        model__too=torch.zeros(1),
        # Of files of old, and passed over.
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
    )
    assert cli.main(["checkpoint", "import", str(source), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == (
        f"error: {source} is not of this model: model.embed_tokens.weight is (128, 16) in it and "
        "(128, 32) in this model; model.norm.weight is not in it; model.surplus is in it and not "
        "in this model (and 1 more)\n"
    )
    assert not (tmp_path / "new").exists()


def test_an_output_layer_that_is_tied_may_be_in_the_files_as_well() -> None:
    tied = huggingface_names({"embedding.word_embeddings.weight": (128, 32)}, Heads(4, 2, 8))
    there = {"model.embed_tokens.weight": (128, 32), "lm_head.weight": (128, 32)}
    assert list(differences(tied, there)) == []
    assert list(differences(tied, there | {"lm_head.bias": (128,)})) == [
        "lm_head.bias is in it and not in this model"
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", b"x" * 100, "header"),
        ("model.safetensors.index.json", b"{", "is not JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', r"'\.\./b' is no file"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b"}}', "No such file"),
        ("model.safetensors.index.json", b'{"weight_map": 1}', "is no file beside it"),
    ],
)
def test_damaged_files_are_told_in_a_line(
    files: Path, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    shutil.copytree(files, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    (tmp_path / "copy" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"cannot read .*{reason}"):
        SafetensorsFiles(tmp_path / "copy")


def test_a_checkpoint_that_is_there_is_left_as_it_is(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "recipe.toml").write_text("of a run")
    assert cli.main(["checkpoint", "import", str(files), str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.endswith("recipe.toml already; name another folder\n")
    assert (tmp_path / "there" / "recipe.toml").read_text() == "of a run"


def test_files_without_a_description_cannot_be_imported(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing to import at .*/none: no such file"):
        recipe_of(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor recipe\.toml is beside"):
        recipe_of(tmp_path / "model.safetensors")
    shutil.copy(files / "config.json", tmp_path)
    assert recipe_of(tmp_path / "model.safetensors").model == model_of(CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 4096),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_theta", 10000.5),
        ("num_hidden_layers", None),
        ("hidden_size", "wide"),
    ],
)
def test_what_cannot_be_imported_is_named(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^{field} is "):
        model_of(CONFIG | {field: value})


@pytest.mark.parametrize("recipe", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_a_config_says_all_of_the_model(recipe: Recipe) -> None:
    text = config_of(recipe.model, vocab_size=128, max_sequence_length=16, dtype="float32")
    assert model_of(json.loads(text)) == changed(recipe, model={"max_sequence_length": 16}).model
