"""Silent errors of released Megatron-Core: the verifier finds and names them; ours are corrected.

Where an installed version is not wrong any more, its test fails, and what goes around the error can
go.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from packaging.version import Version
from verified_models import EXPERTS, RECIPES, with_fields

from mcore_lab.backends import torch_backend
from mcore_lab.config import Recipe
from mcore_lab.errors import LayoutError
from mcore_lab.layout import ParallelLayout
from mcore_lab.verify import Reference, VerificationReport

IS_0_19 = Version(importlib.metadata.version("megatron-core")) >= Version("0.19")
TP2 = ParallelLayout(tensor_model_parallel_size=2)
TP2_SP = TP2.resized(sp=True)
ONE_BY_ONE = with_fields(EXPERTS | {"moe_grouped_gemm": False}, num_layers=2, num_moe_experts=4)
SINKS = with_fields({"softmax_type": "learnable"}, num_layers=2)


def verified(
    recipe: Recipe, layout: ParallelLayout, folder: Path, ranks: int = 2
) -> VerificationReport:
    return Reference(recipe, folder, 2, timeout=120).verify(layout, ranks)


def require_named(report: VerificationReport, kinds: set[str], name: str, thread: str) -> None:
    assert report.first is not None
    assert report.first.kind in kinds
    assert name in report.first.name
    assert any(thread in hint for hint in report.hints)


@pytest.mark.parametrize("layout", [TP2, TP2_SP], ids=["tp2", "tp2-sp"])
def test_rotary_keys_that_heads_share_have_a_part_of_their_gradient_upstream(
    layout: ParallelLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "TorchMLASelfAttention", MLASelfAttention)
    report = verified(RECIPES["mla"], layout, tmp_path)
    require_named(report, {"gradient"}, "layers.1.self_attention.linear_kv_down_proj", "#1699")


@pytest.mark.parametrize(
    "layout", [TP2_SP.resized(etp=1), ParallelLayout().resized(etp=2)], ids=["tp2-etp1", "etp2"]
)
def test_experts_split_otherwise_than_the_rest_are_wrong_before_0_19(
    layout: ParallelLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified(ONE_BY_ONE, layout, tmp_path).require()
    monkeypatch.setattr(torch_backend, "SequentialExperts", SequentialMLP)
    report = verified(ONE_BY_ONE, layout, tmp_path)
    if IS_0_19:
        report.require()
    else:
        require_named(report, {"gradient", "copies"}, "layers.1.mlp.experts", "#5916")


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_predicted_tokens_are_weighed_by_each_ranks_tokens(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what is reported, and in 0.19 also in what is trained, so that a rule refuses it.

    On 4 ranks there are others in the world beside those that share a sequence.
    """
    layout = ParallelLayout(context_parallel_size=2)
    if IS_0_19:
        with pytest.raises(LayoutError, match=r"from 0\.17 on needs cp 1"):
            verified(RECIPES["mtp"], layout, tmp_path, ranks)
        monkeypatch.setattr("mcore_lab.layout.parallel.broken_rules", lambda _: [])
    report = verified(RECIPES["mtp"], layout, tmp_path, ranks)
    require_named(report, {"auxiliary loss"}, "multi-token prediction", "#7498")
    gradients = [verdict.name for verdict in report.off if verdict.kind == "gradient"]
    if IS_0_19:
        assert gradients[0].startswith("mtp.layers.0")
    else:
        assert len(report.off) == 1


def test_several_predicted_tokens_and_a_tied_output_over_stages_are_refused(
    tmp_path: Path,
) -> None:
    layout = ParallelLayout(pipeline_model_parallel_size=2)
    with pytest.raises(LayoutError, match=r"--model\.share-embeddings-and-output-weights False"):
        verified(RECIPES["mtp"], layout, tmp_path)
    untied = with_fields(
        {"mtp_num_layers": 1}, num_layers=2, share_embeddings_and_output_weights=False
    )
    verified(untied, layout, tmp_path).require()


def test_the_norm_that_clips_has_the_attention_sinks_of_all_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their share is small, and upstream misses all but one rank's: Megatron-LM #7452."""

    def error_of_norm() -> float:
        report = verified(SINKS, TP2, tmp_path)
        report.require()
        return report.worst["grad norm"].error

    ours = error_of_norm()
    monkeypatch.setattr(torch_backend, "TorchDotProductAttention", DotProductAttention)
    assert error_of_norm() > 10 * ours
