"""What Megatron-Core takes at first, and fails at or gets wrong: why a rule refuses it.

`ACCEPTED` in `test_layout_rules_both_ways.py` points here, and to where the rest is shown.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import small_runs
import torch
from fake_ranks import rank_of_world
from layout_cases import UNIFORM, WRONG, Data, Model, layout_of
from megatron.core import tensor_parallel
from megatron_refuses import TORCH, chunks_of_stage
from on_ranks import on_ranks
from one_rank import OneRank
from small_runs import SMALL, changed, run

from mcore_lab.compat import megatron_core_is_before
from mcore_lab.config import Recipe
from mcore_lab.errors import LabError
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.rules.case import Case
from mcore_lab.model import Stage, gpt_chunk, transformer_config
from mcore_lab.runtime import model_parallel


def recipe_of(
    layout: ParallelLayout | None = None, data: dict[str, Any] | None = None, **model: Any
) -> Recipe:
    """Return a small recipe of one step; `transformer` adds to its fields."""
    fields = SMALL.model.transformer | model.pop("transformer", {})
    recipe = changed(
        SMALL, model={**model, "transformer": fields}, data=data or {}, training={"steps": 1}
    )
    return recipe if layout is None else changed(recipe, layout=vars(layout))


FAILS: dict[str, tuple[Recipe, str]] = {
    "heads_share_query_groups": (recipe_of(num_query_groups=3), "shape '.*' is invalid"),
    "router_has_enough_experts": (
        recipe_of(num_moe_experts=1, transformer={"add_bias_linear": False}),
        "index k out of range",
    ),
    "sequence_fits_the_model": (recipe_of(max_sequence_length=8), "index out of range"),
    "packed_documents_drop_no_attention": (
        recipe_of(data={"pack_documents": True}, transformer={"attention_dropout": 0.1}),
        "torch backend needs attention_dropout=0.0",
    ),
    "whole_layers_are_recomputed": (
        recipe_of(transformer={**UNIFORM, "recompute_num_layers": 2, "mtp_num_layers": 1}),
        "recompute_num_layers must be 1 for MTP recompute",
    ),
    "tied_weights_can_be_saved": (
        recipe_of(
            layout_of(pp=2),
            share_embeddings_and_output_weights=True,
            transformer={"mtp_num_layers": 1},
        ),
        "sharded_state_dict",
    ),
}
if megatron_core_is_before("0.19"):
    FAILS["whole_layers_are_recomputed, in steps that leave a rest"] = (
        recipe_of(transformer={**UNIFORM, "recompute_num_layers": 3}),
        "index 4 is out of range",
    )


@pytest.mark.parametrize(("recipe", "words"), FAILS.values(), ids=list(FAILS))
def test_it_fails_in_the_first_step_or_when_it_is_saved(
    recipe: Recipe, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.layout.check(recipe.model, recipe.data, recipe.layout.pp)
    monkeypatch.setattr(small_runs, "require_startable", lambda *_: None)
    with pytest.raises(LabError, match=words):
        run(recipe, recipe.layout.pp, tmp_path / "run", timeout=60)


def layers_built(layout: ParallelLayout, **fields: Any) -> int:
    """Return the layers that the stages hold together, of four."""
    case = Case(layout=layout, model=Model(transformer=fields), data=Data(), world_size=layout.pp)
    assert layout.check(case.model, case.data, layout.pp)
    count = 0
    for stage in range(layout.pp):
        with rank_of_world(stage, layout.pp):
            count += sum(len(chunk.decoder.layers) for chunk in chunks_of_stage(case, stage))
    return count


def test_a_size_that_the_layout_does_not_have_builds_part_of_the_model() -> None:
    assert layers_built(layout_of(), pipeline_model_parallel_size=2) == 2


def test_two_uneven_ends_of_one_stage_build_only_one_of_them() -> None:
    ends = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    assert layers_built(layout_of(), **dict.fromkeys(ends, 1)) == 1


def test_stages_that_the_layout_does_not_have_are_left_out() -> None:
    assert layers_built(layout_of(pp=2), pipeline_model_parallel_layout="Et|(t|)*2,tL") == 2


def test_heads_that_do_not_divide_the_hidden_size_are_narrower_together() -> None:
    with rank_of_world(0, 1):
        (model,) = chunks_of_stage(WRONG["heads_that_round_the_hidden_size_down"].case, stage=0)
    assert model.decoder.layers[0].self_attention.linear_proj.weight.shape == (64, 60)


def test_an_expert_tensor_size_without_experts_splits_nothing() -> None:
    def shapes(etp: int) -> list[torch.Size]:
        case = Case(layout=layout_of(etp=etp), model=Model(), data=Data(), world_size=2)
        with rank_of_world(0, 2):
            (model,) = chunks_of_stage(case, stage=0)
        return [parameter.shape for parameter in model.parameters()]

    assert shapes(etp=2) == shapes(etp=1)


def test_padding_counts_in_the_auxiliary_loss_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {
        "add_bias_linear": False,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_token_dispatcher_type": "alltoall",
    }
    recipe = recipe_of(num_layers=2, num_moe_experts=4, transformer=fields)
    recipe = changed(recipe, data={"sequence_length": 13})

    def agrees(coefficient: float, folder: Path) -> bool:
        aux = {"moe_aux_loss_coeff": coefficient} if coefficient else {}
        model = {"transformer": recipe.model.transformer | aux}
        one = OneRank(changed(recipe, model=model), folder)
        with monkeypatch.context() as unguarded:
            unguarded.setattr(small_runs, "require_startable", lambda *_: None)
            return one.agrees_with(one.on("2 ranks: cp2", folder))

    assert agrees(0, tmp_path / "without")
    assert not agrees(1, tmp_path / "with")


def first_pass(recipe: Recipe) -> torch.nn.Module:
    """Take a batch forward through the recipe's model on this one rank, and return the model."""
    length = recipe.data.sequence_length
    with model_parallel(recipe.layout):
        config = transformer_config(recipe)
        whole = Stage(vp_stage=None, is_first=True, is_last=True)
        model = gpt_chunk(recipe, config, whole, TORCH, 128)
        tokens, places = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
        hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        model(tokens, places, hidden, labels=tokens)
    return model


@on_ranks(1)
def test_the_bias_of_a_recomputed_mlp_becomes_a_result_of_its_recomputation() -> None:
    """So the backward pass of what is recomputed comes to the same recomputation, for ever."""
    fields = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    kept = first_pass(recipe_of(transformer=fields))
    assert kept.decoder.layers[0].mlp.linear_fc2.bias.is_leaf
    fields["recompute_modules"].append("mlp")
    recomputed = first_pass(recipe_of(transformer=fields))
    node = recomputed.decoder.layers[0].mlp.linear_fc2.bias.grad_fn
    assert type(node).__name__ == "CheckpointFunctionBackward"


class ManyStepsError(Exception):
    """More steps were taken than there are layers."""


@on_ranks(1)
def test_uniform_recomputation_in_steps_of_no_layers_never_ends() -> None:
    steps = itertools.count(1)

    def checkpoint(function: Any, distribute: bool, *inputs: Any) -> Any:
        if next(steps) > 100:
            raise ManyStepsError
        return function(*inputs)

    recipe = recipe_of(transformer={**UNIFORM, "recompute_num_layers": 0})
    with patch.object(tensor_parallel, "checkpoint", checkpoint), pytest.raises(ManyStepsError):
        first_pass(recipe)
