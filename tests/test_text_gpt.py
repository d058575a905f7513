"""text_gpt learns to write as this repository is written, one byte after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import changed, run

from mcore_lab.config import Recipe
from mcore_lab.recipes import load_recipe

PACKAGE = Path(__file__).parent.parent / "mcore_lab"


def text_gpt(folder: Path, **training: Any) -> Recipe:
    data = {"path": str(PACKAGE), "cache_dir": str(folder / "cache")}
    return changed(load_recipe("text_gpt"), data=data, training=training)


def validation_losses(folder: Path) -> list[float]:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["valid_loss"] for line in lines]


def test_a_few_steps_teach_which_bytes_are_frequent(tmp_path: Path) -> None:
    recipe = text_gpt(tmp_path, steps=24, lr_warmup_steps=8, eval_every=12)
    run(recipe, 2, tmp_path / "run", timeout=280)
    first, last = validation_losses(tmp_path / "run")
    # Bytes drawn evenly would cost 5.5 nats.
    assert 2.0 < last < 3.2
    assert last < first < 4.5


@pytest.mark.slow
def test_the_validation_loss_falls_below_3_nats_a_byte_within_200_steps(tmp_path: Path) -> None:
    recipe = text_gpt(tmp_path)
    assert recipe.training.steps == 200
    metrics = run(recipe, 2, tmp_path / "run", timeout=1500)
    measured = validation_losses(tmp_path / "run")
    assert measured == sorted(measured, reverse=True)
    assert 1.0 < measured[-1] < 2.8 < 3.0
    # What it has not seen costs it little more than what it has: it does not know it by heart.
    trained = [line["loss"] for line in metrics[-20:]]
    assert measured[-1] < sum(trained) / len(trained) + 0.5
