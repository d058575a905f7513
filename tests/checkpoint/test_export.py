"""A checkpoint of any layout is written as safetensors, and others read it as what it is."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disks import small_disk
from exchanged import LLAMA, MIXTRAL, SAME, TOKENS, logits_of, with_fields
from safetensors.torch import load_file
from small_runs import SMALL, changed, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from mcore_lab import cli
from mcore_lab.checkpoint.contents import tensors_of
from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.checkpoint.read import read
from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError
from mcore_lab.exchange.export import export
from mcore_lab.exchange.huggingface_config import misfits
from mcore_lab.exchange.huggingface_names import Heads, huggingface_names

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Llama on two tensor-parallel ranks, with its optimizer."""
    folder = tmp_path_factory.mktemp("llama")
    run(changed(LLAMA, layout=TP2), 2, folder)
    return require_checkpoint(folder)


def exported(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """Return what the command prints as JSON."""
    capsys.readouterr()
    status = cli.main(["checkpoint", "export", *map(str, words), "--json"])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed | {"status": status}


def logits_in_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(TOKENS)).logits
    return logits


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        pytest.param(with_fields(LLAMA, kv_channels=16), TP2, id="llama-tp2-wide-heads"),
        pytest.param(
            changed(LLAMA, model={"share_embeddings_and_output_weights": True}), PP2, id="tied-pp2"
        ),
        pytest.param(MIXTRAL, PP2, id="mixtral-pp2-grouped"),
        pytest.param(
            with_fields(MIXTRAL, moe_grouped_gemm=False),
            TP2 | {"sequence_parallel": True},
            id="mixtral-tp2-sequential",
        ),
    ],
)
def test_transformers_computes_the_same_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Recipe, layout: dict[str, Any]
) -> None:
    run(changed(recipe, layout=layout), 2, tmp_path / "run")
    told = exported(capsys, tmp_path / "run", tmp_path / "out")
    assert (told["status"], told["naming"], told["note"]) == (0, "huggingface", "")
    ours = logits_of(require_checkpoint(tmp_path / "run"), recipe)
    torch.testing.assert_close(logits_in_transformers(tmp_path / "out"), ours, **SAME)
    assert ours.std() > 0.1


def test_megatron_names_are_those_of_layers_and_hold_what_the_checkpoint_does(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = exported(capsys, llama, tmp_path / "out", "--naming", "megatron")
    assert told["files"] == ["model.safetensors", "recipe.toml"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert told["tensors"] == len(found) == 3 + 2 * 6
    assert told["size"] == sum(tensor.nbytes for tensor in found.values())
    fc1 = read(llama, tensors_of(llama)["decoder.layers.mlp.linear_fc1.weight"])
    assert fc1.shape == (2, 96, 32)
    for layer in range(2):
        assert torch.equal(found[f"decoder.layers.{layer}.mlp.linear_fc1.weight"], fc1[layer])


def test_a_model_that_hugging_face_lacks_gets_megatron_names_and_is_told_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(changed(SMALL, training={"steps": 0}), 1, tmp_path / "run")
    told = exported(capsys, tmp_path / "run", tmp_path / "out")
    assert told["naming"] == "megatron"
    assert told["note"].startswith("model.position_embedding_type is 'learned_absolute', and that ")
    words = ["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "not")]
    assert cli.main([*words, "--naming", "huggingface"]) == 2
    error = capsys.readouterr().err
    assert "normalization is 'LayerNorm', and that of a Llama 'RMSNorm'" in error
    assert error.endswith("; --naming megatron writes any model\n") and error.count("\n") == 1
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("recipe", "field", "value"),
    [
        (LLAMA, "model.position_embedding_type", "learned_absolute"),
        (LLAMA, "model.rotary_percent", 0.5),
        (LLAMA, "model.rope_scaling", True),
        (LLAMA, "model.seq_len_interpolation_factor", 2.0),
        (LLAMA, "normalization", "LayerNorm"),
        (LLAMA, "activation_func", "gelu"),
        (LLAMA, "gated_linear_unit", False),
        (LLAMA, "add_bias_linear", True),
        (LLAMA, "add_qkv_bias", True),
        (LLAMA, "rotary_interleaved", True),
        (LLAMA, "layernorm_zero_centered_gamma", True),
        (LLAMA, "qk_layernorm", True),
        (LLAMA, "multi_latent_attention", True),
        (LLAMA, "mtp_num_layers", 1),
        (LLAMA, "softmax_type", "learnable"),
        (LLAMA, "softmax_scale", 0.5),
        (LLAMA, "window_size", [4, 0]),
        (LLAMA, "apply_residual_connection_post_layernorm", True),
        (LLAMA, "a_field_of_later_versions", 1),
        (MIXTRAL, "moe_layer_freq", 2),
        (MIXTRAL, "moe_shared_expert_intermediate_size", 32),
        (MIXTRAL, "moe_router_pre_softmax", True),
        (MIXTRAL, "moe_router_score_function", "sigmoid"),
        (MIXTRAL, "moe_router_topk_scaling_factor", 2.0),
        (MIXTRAL, "moe_router_enable_expert_bias", True),
        (MIXTRAL, "moe_router_num_groups", 2),
        (MIXTRAL, "moe_expert_capacity_factor", 1.0),
        (MIXTRAL, "moe_router_load_balancing_type", "sinkhorn"),
    ],
)
def test_what_a_llama_or_mixtral_does_not_have_is_named(
    recipe: Recipe, field: str, value: object
) -> None:
    assert misfits(recipe.model) == []
    part, _, name = field.rpartition(".")
    other = changed(recipe, model={name: value}) if part else with_fields(recipe, **{field: value})
    found = misfits(other.model)
    assert len(found) == 1
    assert found[0].startswith(f"{field if part else f'model.transformer.{field}'} is {value!r}, ")


def test_norms_have_their_names_whichever_layers_a_checkpoint_was_saved_from() -> None:
    """Transformer Engine's layers of experts name the second norm by its module."""
    norms = ("self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight")
    shapes = {f"decoder.layers.{norm}": (2, 32) for norm in norms}
    names = [one.name for one in huggingface_names(shapes, Heads(4, 2, 8))]
    assert names == [
        f"model.layers.{layer}.{norm}.weight"
        for norm in ("input_layernorm", "post_attention_layernorm")
        for layer in range(2)
    ]
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.odd\.weight is of no tensor"):
        huggingface_names({"decoder.layers.odd.weight": (2, 32)}, Heads(4, 2, 8))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors have held at once, of those that were made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **kwargs or {})
        new = [weakref.ref(leaf) for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self._seen = [ref for ref in [*self._seen, *new] if ref() is not None]
        held = [tensor.untyped_storage() for ref in self._seen if (tensor := ref()) is not None]
        self.most = max(self.most, sum({one.data_ptr(): one.nbytes() for one in held}.values()))
        return made


def test_no_more_than_a_few_tensors_are_in_memory_at_a_time(tmp_path: Path) -> None:
    deep = changed(LLAMA, model={"num_layers": 12, "ffn_hidden_size": 128}, training={"steps": 0})
    run(deep, 1, tmp_path / "run")
    with LiveBytes() as live:
        done = export(require_checkpoint(tmp_path / "run"), tmp_path / "out", deep)
    largest = 4 * 2 * 128 * 32
    assert done.size > 12 * largest
    # A matrix of a layer, a part of it as it was stored, and a part as it is written.
    assert largest <= live.most <= 3 * largest


def test_files_are_as_small_as_asked_for_and_transformers_follows_their_index(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = exported(capsys, llama, tmp_path / "out", "--shard-size", "20KB")
    *files, index, _ = told["files"]
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    shards = [load_file(tmp_path / "out" / name) for name in files]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert max(sizes) <= 20_000 and sum(sizes) == told["size"]
    weights = json.loads((tmp_path / "out" / index).read_text())["weight_map"]
    assert weights == {
        tensor: name for name, shard in zip(files, shards, strict=True) for tensor in shard
    }
    torch.testing.assert_close(
        logits_in_transformers(tmp_path / "out"), logits_of(llama, LLAMA), **SAME
    )


def test_a_folder_that_is_there_is_left_as_it_is(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out is there already"):
        export(llama, tmp_path / "out", LLAMA)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    if not foreseen:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    with small_disk(tmp_path / "disk", "64k") as disk:
        reason = "MB are free" if foreseen else "No space left on device"
        with pytest.raises(CheckpointError, match=rf"cannot write .*{reason}"):
            export(llama, disk / "out", LLAMA)
        assert list(disk.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    shard = copy / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is damaged"):
        export(copy, tmp_path / "out", LLAMA)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*__1_0\.distcp"):
        export(copy, tmp_path / "out", LLAMA, verify=False)
    assert list(tmp_path.iterdir()) == [copy]


def test_a_tensor_with_a_part_missing_is_not_read_as_if_it_were_whole(llama: Path) -> None:
    tensor = tensors_of(llama)["output_layer.weight"]
    with pytest.raises(CheckpointError, match=r"holds 2,048 numbers of output_layer\.weight in pl"):
        read(llama, replace(tensor, chunks=tensor.chunks[:1]))


def test_a_size_that_is_none_is_refused(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint", "export", str(llama), "out", "--shard-size", "much"]
    assert cli.main(words) == 2
    assert "--shard-size expects a size like 5GB" in capsys.readouterr().err
