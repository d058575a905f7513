"""The published matrix: what is drawn is what was found, for these models and these rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore_lab.report.sweep_matrix import sweep_matrix_svg
from mcore_lab.verify.layouts import allowed_layouts
from mcore_lab.verify.sweep import DENSE, MOE, layout_words

PUBLISHED = Path(__file__).parents[2] / "recipes" / "verified"
FILES = sorted(PUBLISHED.glob("*.json"))


def sweeps() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in FILES]


def test_the_picture_is_drawn_from_the_data():
    assert (PUBLISHED / "matrix.svg").read_text() == sweep_matrix_svg(sweeps())


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_layout_that_the_rules_allow_was_tried(file: Path):
    found = json.loads(file.read_text())
    world = max(one["world_size"] for one in found["outcomes"])
    assert found["command"].endswith(f"--world {world}")
    for recipe in (DENSE, MOE):
        if recipe.name not in found["summary"]:
            continue
        allowed, refused = allowed_layouts(recipe, world)
        tried = {
            (one["world_size"], one["layout"])
            for one in found["outcomes"]
            if one["recipe"] == recipe.name
        }
        assert tried == {(ranks, layout_words(ranks, layout)) for ranks, layout in allowed}
        assert found["summary"][recipe.name]["refused"] == refused


def test_a_square_is_there_for_each_layout_with_what_it_found():
    outcome = {"recipe": "dense", "world_size": 2, "seconds": 1.0}
    outcomes = [
        outcome | {"layout": "tp2", "status": "passed", "conclusion": "fine"},
        outcome | {"layout": "cp2", "status": "wrong", "conclusion": "first <gradient> off"},
    ]
    summary = {"dense": {"passed": 1, "wrong": 1, "failed": 0, "refused": 3}}
    svg = sweep_matrix_svg([{"megatron_core": "9.9", "summary": summary, "outcomes": outcomes}])
    assert svg.count("<title>") == 2
    assert "<title>tp2</title>" in svg and "first &lt;gradient&gt; off" in svg
    assert "1 passed, 1 wrong, 3 refused by the rules" in svg
