"""Sixteen ranks, far more than a laptop has cores, train as one does: slowly."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_rank import OneRank
from small_runs import SMALL, changed

EXPERTS = {
    "add_bias_linear": False,
    "moe_ffn_hidden_size": 48,
    "moe_router_load_balancing_type": "none",
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    ["16 ranks: tp2 sp pp2 cp2 zero", "16 ranks: tp2 sp pp2 vpp2 cp2 ep4 etp1"],
)
def test_every_dimension_at_once_trains_as_on_one_rank(tmp_path: Path, layout: str) -> None:
    shape = {"position_embedding_type": "rope"}
    if "ep4" in layout:
        shape |= {"num_moe_experts": 4, "transformer": SMALL.model.transformer | EXPERTS}
    recipe = changed(SMALL, model=shape, training={"steps": 2})
    one_rank = OneRank(recipe, tmp_path)
    assert one_rank.agrees_with(one_rank.on(layout, tmp_path / "many", timeout=480))
