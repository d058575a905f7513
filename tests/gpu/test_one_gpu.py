"""One rank on a GPU computes what one on the CPU does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from one_rank import OneRank
from small_runs import SMALL, changed, losses, run

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import load_recipe
from mcore_lab.runtime import choose_device

# Counting them does not start CUDA, after which no rank could be forked for the CPU.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="torch finds no CUDA device"),
]
LOSS, NORM = 1e-4, 1e-3
"""Relative; a GPU's kernels sum in fp32 in an order of their own."""
EXPERTS = {
    "add_bias_linear": False,
    "moe_router_load_balancing_type": "none",
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}
RECIPES: dict[str, Recipe] = {
    "dense": SMALL,
    "mixture of experts": changed(
        SMALL,
        model={"num_moe_experts": 4, "transformer": SMALL.model.transformer | EXPERTS},
    ),
    "tp2_gpt": changed(load_recipe("tp2_gpt"), layout={"tensor_model_parallel_size": 1}),
}


@contextmanager
def no_gpu_seen() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_device(1).type == "cpu"
        yield


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_on_pytorch_s_modules_it_trains_as_on_the_cpu(tmp_path: Path, recipe: Recipe) -> None:
    with no_gpu_seen():
        on_cpu = OneRank(changed(recipe, model={"backend": "torch"}), tmp_path)
    assert choose_device(1).type == "cuda"
    on_gpu = on_cpu.on("1 ranks:", tmp_path / "gpu")
    assert on_cpu.agrees_with(on_gpu, LOSS, NORM)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_transformer_engine_s_modules_it_learns(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    recipe = changed(
        load_recipe("tp2_gpt"),
        layout={"tensor_model_parallel_size": 1},
        model={"backend": "te"},
        training={"precision": precision},
    )
    assert recipe.layout == ParallelLayout()
    first, *_, last = losses(run(recipe, 1, tmp_path / "te"))
    assert first == pytest.approx(math.log(recipe.model.vocab_size or 0), rel=0.1)
    assert last < first - 0.1
