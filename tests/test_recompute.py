"""Activations that are computed again are the same, dropout included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank
from small_runs import SMALL, changed, grad_norms, losses

from mcore_lab import cpu
from mcore_lab.errors import RankFailedError

cpu.preload()

from megatron.core.tensor_parallel.random import CheckpointFunction  # noqa: E402

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
LAYOUT = "2 ranks: tp2 sp"
WAYS: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "full, uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full, the first layer of each stage": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    recipe = changed(SMALL, model={"num_layers": 2}, training={"steps": 3})
    return OneRank(recipe, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def kept(small: OneRank, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return a run with dropout that keeps its activations."""
    metrics = small.on(LAYOUT, tmp_path_factory.mktemp("kept"), **DROPOUT)
    assert losses(metrics) != pytest.approx(losses(small.metrics), rel=1e-4)
    return metrics


@pytest.mark.parametrize("fields", WAYS.values(), ids=list(WAYS))
def test_dropout_falls_on_the_same_activations_again(
    small: OneRank, kept: list[dict[str, Any]], tmp_path: Path, fields: dict[str, Any]
) -> None:
    metrics = small.on(LAYOUT, tmp_path, **DROPOUT, **fields)
    assert losses(metrics) == pytest.approx(losses(kept), rel=1e-6)
    assert grad_norms(metrics) == pytest.approx(grad_norms(kept), rel=1e-6)


def test_recomputation_of_pipeline_stages_trains_as_on_one_rank(
    small: OneRank, tmp_path: Path
) -> None:
    assert small.agrees_with(small.on("2 ranks: pp2", tmp_path, **WAYS["full, uniform"]))


def test_a_feed_forward_layer_without_a_bias_is_computed_again_too(tmp_path: Path) -> None:
    """With a bias its backward pass would never end; a rule refuses that."""
    fields = SMALL.model.transformer | {"add_bias_linear": False}
    recipe = changed(SMALL, model={"num_layers": 2, "transformer": fields}, training={"steps": 2})
    small = OneRank(recipe, tmp_path / "one")
    again = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    assert small.agrees_with(small.on(LAYOUT, tmp_path, **again))


def test_it_is_computed_again(
    small: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("it would be computed again")

    monkeypatch.setattr(CheckpointFunction, "backward", staticmethod(refuse))
    with pytest.raises(RankFailedError, match="it would be computed again"):
        small.on("1 ranks:", tmp_path, **WAYS["selective"])
