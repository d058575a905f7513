"""Sequences and documents that ranks cannot share evenly are padded, and nobody notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank
from small_runs import SMALL, changed

from mcore_lab.config import Recipe

UNEVEN = {"sequence_length": 13, "mock_document_length": 9}


def _recipe(data: dict[str, Any], **transformer: Any) -> Recipe:
    model = {
        "num_layers": 2,
        "position_embedding_type": "rope",
        "transformer": SMALL.model.transformer | transformer,
    }
    return changed(SMALL, model=model, data=data, training={"steps": 3})


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(_recipe(UNEVEN), tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(_recipe(UNEVEN | {"pack_documents": True}), tmp_path_factory.mktemp("packed"))


LAYOUTS = [
    "2 ranks: cp2",
    "2 ranks: tp2 sp",
    "4 ranks: tp2 sp cp2",
    "4 ranks: cp2 pp2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_that_ranks_cannot_share_trains_as_on_one_rank(
    uneven: OneRank, layout: str, tmp_path: Path
):
    assert uneven.agrees_with(uneven.on(layout, tmp_path))


@pytest.mark.parametrize("layout", [*LAYOUTS, "2 ranks: zero", "2 ranks: pp2"])
def test_packed_documents_train_as_on_one_rank(packed: OneRank, layout: str, tmp_path: Path):
    assert packed.agrees_with(packed.on(layout, tmp_path))


def test_packed_documents_are_not_one_sequence(uneven: OneRank, packed: OneRank):
    assert not packed.agrees_with(uneven.metrics)
