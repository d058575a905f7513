"""A run that was stopped goes on bit for bit as the one that was not, dropout and all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contents import common_of, differences, sharded_of
from small_runs import SMALL, changed, losses, run

from mcore_lab.cli.arguments import usual_world
from mcore_lab.config import Recipe, recipe_from_toml
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import later_layouts, load_recipe, recipe_names, shown_layer
from mcore_lab.runtime import launch, model_parallel

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
FEW_RANKS = 2
WORDS = "the quick brown fox jumps over the lazy dog and runs on into the woods until it is dark. "


def small(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe with its layout and kind of model, small, with the dropout it can have."""
    dropout = DROPOUT if recipe.layout.cp == 1 else {"hidden_dropout": 0.1}
    model: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "transformer": {**recipe.model.transformer, **dropout},
    }
    data: dict[str, Any] = {"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 4}
    if recipe.data.path:
        (folder / "text").mkdir()
        for document in range(40):
            (folder / "text" / f"{document}.txt").write_text(WORDS * 4)
        data |= {"path": str(folder / "text"), "cache_dir": str(folder / "cache")}
    else:
        data["mock_document_length"] = 12
    training = {"steps": 4, "eval_every": 1, "eval_samples": 4}
    return changed(recipe, model=model, data=data, training=training, checkpoint={"save_every": 2})


def goes_on_exactly(recipe: Recipe, nproc: int, folder: Path) -> None:
    """Compare steps 3 and 4 after a stop with those of one go: losses, and all that is saved."""
    whole = run(recipe, nproc, folder / "whole")
    middle = str(folder / "whole" / "checkpoints" / "step-00000002")
    after = run(changed(recipe, training={"resume": middle}), nproc, folder / "after")
    assert [line["step"] for line in after] == [3, 4]
    for name in ("loss", "grad_norm", "lr", "mtp_loss"):
        assert [line[name] for line in after] == [line[name] for line in whole][2:]
    last = [folder / name / "checkpoints" / "step-00000004" for name in ("whole", "after")]
    assert differences(*last) == []


# A recipe of several layouts shares its steps among them: fewer steps are other legs.
TRAINED = [name for name in recipe_names() if not shown_layer(name) and not later_layouts(name)]
MANY_RANKS = [name for name in TRAINED if usual_world(load_recipe(name)) > FEW_RANKS]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MANY_RANKS)) for name in TRAINED],
)
def test_every_recipe_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    goes_on_exactly(small(recipe, tmp_path), usual_world(recipe), tmp_path)


RECOMPUTING = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EXPERTS = {
    "add_bias_linear": False,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
MIXTURE = {"num_moe_experts": 4, "num_layers": 2}
OVERLAPPING = {"overlap_grad_reduce": True, "overlap_param_gather": True}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2, sequence-parallel, recomputed, bf16": {
        "layout": TP2 | {"sequence_parallel": True},
        "transformer": RECOMPUTING,
        "training": {"precision": "bf16"},
    },
    "distributed optimizer, overlapping, bf16": {
        "layout": SHARDED,
        "training": {"precision": "bf16", "ddp": OVERLAPPING},
    },
    "pp2, interleaved, distributed optimizer": {"layout": VPP2 | SHARDED},
    "momentum of sgd": {"layout": TP2, "training": {"optimizer": {"optimizer": "sgd"}}},
    "experts with a bias that is balanced, bf16": {
        "layout": EP2 | SHARDED,
        "model": MIXTURE,
        "transformer": EXPERTS,
        "training": {"precision": "bf16"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    parts = dict(KINDS[kind])
    recipe = changed(SMALL, model=parts.pop("model", {}), training={"min_lr": 1e-3})
    transformer = recipe.model.transformer | DROPOUT | parts.pop("transformer", {})
    schedule = {"lr_warmup_steps": 1, "lr_decay_style": "cosine", **parts.pop("training", {})}
    recipe = changed(recipe, model={"transformer": transformer}, training=schedule, **parts)
    goes_on_exactly(changed(recipe, checkpoint={"save_every": 2}), 2, tmp_path)


DROPPING = changed(SMALL, model={"transformer": SMALL.model.transformer | DROPOUT})


def test_a_run_that_ends_goes_on_as_one_that_was_to_go_on(tmp_path: Path) -> None:
    """The one in one go writes nothing on its way: writing does not change what comes after."""
    whole = run(changed(DROPPING, layout=TP2), 2, tmp_path / "whole")
    first = changed(DROPPING, layout=TP2, training={"steps": 1})
    run(first, 2, tmp_path / "stopped")
    then = changed(first, training={"steps": 4, "resume": "auto"})
    assert losses(run(then, 2, tmp_path / "stopped")) == losses(whole)
    last = [tmp_path / name / "checkpoints" / "step-00000004" for name in ("whole", "stopped")]
    assert differences(*last) == []


# The random generators.


def draws() -> list[float]:
    """Draw a number from each generator of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    drawn = [random.random(), np.random.random(), torch.rand(1).item()]
    drawn.append(torch.rand(1, device="cuda").item())
    for name in get_cuda_rng_tracker().get_states():
        with get_cuda_rng_tracker().fork(name):
            drawn.append(torch.rand(1, device="cuda").item())
    return drawn


def drawn_twice() -> tuple[list[float], list[float], Any]:
    from mcore_lab.checkpoint.random_state import random_state, set_random_state

    layout = ParallelLayout(tensor_model_parallel_size=2)
    with model_parallel(layout) as world:
        random.seed(world.rank)
        np.random.seed(world.rank)
        torch.manual_seed(world.rank)
        draws()
        saved = random_state()
        first = draws()
        set_random_state(saved.data)
        return first, draws(), saved.without_data()


def test_every_generator_of_every_rank_draws_again_what_it_drew() -> None:
    ranks = launch(drawn_twice, 4, timeout=60)
    assert all(first == again for first, again, _ in ranks)
    kinds = list(zip(*(first for first, _, _ in ranks), strict=True))
    assert len(kinds) >= 6
    # Each rank has its own; what the tensor-parallel seeds decide differs by tensor-parallel rank.
    assert all(len(set(numbers)) == 4 for numbers in kinds[:3])
    assert any(len(set(numbers)) == 2 for numbers in kinds[3:])
    keys = ["rng_state/shard_0.0_1.2", "rng_state/shard_0.1_1.2"] * 2
    assert [sharding.unique_key for _, _, sharding in ranks] == keys


def test_random_states_are_saved_in_the_form_of_megatron_lm(tmp_path: Path) -> None:
    run(changed(DROPPING, training={"steps": 1}), 2, tmp_path)
    saved = sharded_of(tmp_path / "checkpoints" / "step-00000001")
    [[states]] = [value for key, value in saved.items() if key.startswith("rng_state")]
    assert len(states) == 2
    for state in states:
        random.Random().setstate(state["random_rng_state"])
        np.random.RandomState().set_state(state["np_rng_state"])
        assert state["torch_rng_state"].dtype == state["cuda_rng_state"].dtype == torch.uint8
        assert "model-parallel-rng" in state["rng_tracker_states"]


def test_on_another_layout_generators_start_from_the_seed_and_the_log_says_why(
    tmp_path: Path,
) -> None:
    run(changed(DROPPING, training={"steps": 1}), 2, tmp_path / "dp2")
    resume = {"steps": 2, "resume": str(tmp_path / "dp2")}
    recipe = changed(DROPPING, layout=PP2, training=resume)
    metrics = run(recipe, 2, tmp_path / "pp2")
    assert [line["step"] for line in metrics] == [2]
    for rank in (0, 1):
        log = (tmp_path / "pp2" / "logs" / f"rank-{rank}.log").read_text()
        assert "random states are taken from the recipe's seed" in log
        assert "pipeline_model_parallel_size 1 and not 2, data_parallel_size 2 and not 1" in log
    run(changed(DROPPING, training=resume), 2, tmp_path / "again")
    assert "random states" not in (tmp_path / "again" / "logs" / "rank-0.log").read_text()


# The position in the data.


def test_another_global_batch_size_goes_on_at_the_next_sample(tmp_path: Path) -> None:
    """With a learning rate of 0 a batch of 16 has the mean loss of the two of 8 in its place."""
    still = changed(SMALL, training={"lr": 0.0})
    run(changed(still, training={"steps": 3}), 1, tmp_path / "first")
    resumed = changed(still, training={"steps": 5, "resume": str(tmp_path / "first")})
    small_steps = run(resumed, 1, tmp_path / "small")
    large = changed(resumed, training={"steps": 4}, data={"global_batch_size": 16})
    [large_step] = run(large, 2, tmp_path / "large")
    assert large_step["loss"] == pytest.approx(sum(losses(small_steps)) / 2, rel=1e-6)
    last = tmp_path / "large" / "checkpoints" / "step-00000004"
    assert common_of(last)["consumed_train_samples"] == 3 * 8 + 16


def test_a_checkpoint_holds_its_recipe(tmp_path: Path) -> None:
    recipe = changed(SMALL, training={"steps": 1}, layout=TP2)
    run(recipe, 2, tmp_path)
    toml = common_of(tmp_path / "checkpoints" / "step-00000001")["recipe"]
    (tmp_path / "recipe.toml").write_text(toml)
    assert recipe_from_toml(tmp_path / "recipe.toml") == recipe
