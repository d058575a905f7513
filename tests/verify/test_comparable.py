"""What depends on the layout by its definition is said before anything runs, with a way out."""

from __future__ import annotations

from typing import Any

import pytest
from verified_models import EXPERTS, RECIPES, with_fields

from mcore_lab.errors import ConfigError
from mcore_lab.verify.comparable import require_comparable


@pytest.mark.parametrize("name", RECIPES)
def test_models_that_are_verified_are_comparable(name: str) -> None:
    require_comparable(RECIPES[name])


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [
        ({"hidden_dropout": 0.1}, "--model.transformer.hidden-dropout 0"),
        ({"attention_dropout": 0.1}, "--model.transformer.attention-dropout 0"),
        ({"moe_input_jitter_eps": 0.1}, "--model.transformer.moe-input-jitter-eps None"),
        ({"moe_expert_capacity_factor": 1}, "--model.transformer.moe-expert-capacity-factor None"),
        (
            {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
            "--model.transformer.moe-aux-loss-coeff 0",
        ),
        (
            {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01},
            "--model.transformer.moe-aux-loss-coeff 0",
        ),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            "--model.transformer.moe-router-load-balancing-type none",
        ),
        (
            {"moe_router_enable_expert_bias": True},
            "--model.transformer.moe-router-enable-expert-bias False",
        ),
    ],
)
def test_what_depends_on_the_layout_is_said_with_what_to_set(
    fields: dict[str, Any], way_out: str
) -> None:
    recipe = with_fields(EXPERTS | fields, num_moe_experts=4)
    with pytest.raises(ConfigError, match=way_out):
        require_comparable(recipe)


def test_a_loss_by_sequence_is_comparable() -> None:
    by_sequence = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}
    require_comparable(with_fields(EXPERTS | by_sequence, num_moe_experts=4))
