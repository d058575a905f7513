"""What the lessons find: split over ranks, training is that of one rank."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mcore_lab import lessons
from mcore_lab.lessons.start import give
from mcore_lab.lessons.transformer import Config, Transformer
from mcore_lab.runtime import launch, process_group

SECONDS = 60

SMALL: dict[str, dict[str, Any]] = {
    "collectives": {"numbers": 1001},
    "data_parallel": {"hidden_size": 24, "batch_size": 12, "timed_steps": 2},
    "zero": {"hidden_size": 23, "batch_size": 12},
    "tensor_parallel": {"hidden_size": 16, "ffn_hidden_size": 50},
    "vocabulary_parallel": {"vocab_size": 101},
    "transformer": {"vocab_size": 101, "hidden_size": 24, "num_attention_heads": 6, "steps": 12},
}


@functools.cache
def found(ranks: int) -> dict[str, Any]:
    """Return what each lesson finds, on rank 0."""

    def every_lesson() -> dict[str, Any]:
        findings = {}
        for name, sizes in SMALL.items():
            lesson = lessons.load_lesson(name)
            findings[name] = give(lesson.run, lesson.settings(**sizes), silent=True)
        return findings

    return launch(every_lesson, ranks, timeout=SECONDS, megatron_core=False)[0]


RANKS = pytest.mark.parametrize("ranks", [2, 3])


@RANKS
def test_collectives_leave_on_each_rank_what_their_names_say(ranks: int) -> None:
    everyone = range(ranks)
    own = [[10 * rank + i for i in everyone] for rank in everyone]
    total = [sum(column) for column in zip(*own, strict=True)]
    firsts = [[10 * rank] for rank in everyone]
    nothing = [None] * (ranks - 1)
    begun = {name: [before for before, _ in each] for name, each in shown(ranks).items()}
    assert {name: own if len(each[0]) > 1 else firsts for name, each in begun.items()} == begun
    assert {name: [after for _, after in each] for name, each in shown(ranks).items()} == {
        "broadcast": [own[0]] * ranks,
        "scatter": [[part] for part in own[0]],
        "reduce": [total, *nothing],
        "reduce_scatter": [[part] for part in total],
        "all_reduce": [total] * ranks,
        "all_to_all": [list(column) for column in zip(*own, strict=True)],
        "send_and_receive": [own[rank - 1] for rank in everyone],
        "gather": [[10 * rank for rank in everyone], *nothing],
        "all_gather": [[10 * rank for rank in everyone]] * ranks,
    }


def shown(ranks: int) -> dict[str, list[Any]]:
    return found(ranks)["collectives"]["collectives"]


@RANKS
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_and_can_go_round_a_ring(
    ranks: int,
) -> None:
    of = found(ranks)["collectives"]
    assert of["difference_in_two"] < 1e-6 and of["difference_by_ring"] < 1e-6
    # Chunks differ by one number where 1001 is not divisible: two of them are sent a step.
    assert of["bytes_sent_by_ring"] == pytest.approx(
        2 * (ranks - 1) / ranks * of["bytes"], abs=4 * 2 * (ranks - 1)
    )


@RANKS
def test_data_parallel_ranks_have_losses_of_their_own_and_the_parameters_of_one_rank(
    ranks: int,
) -> None:
    of = found(ranks)["data_parallel"]
    for *losses, mean, expected in of["losses"]:
        assert len(set(losses)) == len(losses) == ranks
        assert mean == pytest.approx(expected, rel=1e-5)
    assert of["parameters_differ_by"] == 0
    assert of["from_one_rank_by"] < 1e-6
    assert min(of["seconds"].values()) > 0


@RANKS
def test_zero_holds_a_part_of_adams_state_and_takes_the_same_steps(ranks: int) -> None:
    of = found(ranks)["zero"]
    count = 4 * (23 * 23 + 23)
    for held in of["bytes"]:
        assert held["plain"] == {"parameters": 4 * count, "Adam's state": 2 * 4 * count}
        assert held["sharded"]["parameters"] == 4 * count
        assert held["sharded"]["Adam's state"] == 2 * 4 * -(-count // ranks)
    assert of["parameters_differ_by"] < 1e-6


@RANKS
def test_a_split_mlp_has_the_losses_of_one_rank_and_the_trap_a_gradient_too_large(
    ranks: int,
) -> None:
    of = found(ranks)["tensor_parallel"]
    assert of["losses"] == pytest.approx(of["losses_of_one_rank"], rel=1e-6)
    assert of["losses"][-1] < of["losses"][0]
    assert of["gradient_too_large_by"] == pytest.approx(ranks**4, rel=1e-5)
    inner = [row["fc1.weight"][0] for row in of["held"]]
    assert sum(inner) == 50 and max(inner) - min(inner) < 2


@RANKS
def test_an_uneven_vocabulary_is_embedded_and_predicted_as_on_one_rank(ranks: int) -> None:
    rows = found(ranks)["vocabulary_parallel"]["ranks"]
    assert sum(row["tokens among them"] for row in rows) == 32
    for row in rows:
        differences = [value for value in row.values() if isinstance(value, float)]
        assert len(differences) == 4 and max(differences) < 1e-6


@RANKS
def test_a_split_transformer_learns_as_on_one_rank(ranks: int) -> None:
    of = found(ranks)["transformer"]
    assert of["losses"] == pytest.approx(of["losses_of_one_rank"], rel=1e-4)
    assert of["losses"][-1] < of["losses"][0] - 0.1
    assert max(of["parameters"]) < of["of"]


EXPERIMENT = Config(
    vocab_size=1024,
    hidden_size=512,
    num_layers=8,
    num_attention_heads=8,
    ffn_hidden_size=1024,
    max_sequence_length=1024,
)
SPLIT = {1: 18_397_184, 2: 9_473_536, 4: 5_011_712}


@functools.cache
def on_groups() -> list[dict[int, dict[str, Any]]]:
    """Return for groups of 1, 2 and 4 ranks what each rank holds and computes."""

    def rank() -> dict[int, dict[str, Any]]:
        with process_group(megatron_core=False):
            groups = {size: dist.new_subgroups(group_size=size)[0] for size in SPLIT}
            return {size: _held_and_computed(group) for size, group in groups.items()}

    return launch(rank, 4, timeout=SECONDS, megatron_core=False)


def _held_and_computed(group: dist.ProcessGroup) -> dict[str, Any]:
    # The numbers are not needed, which take a second to be drawn.
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in Transformer(EXPERIMENT, group).parameters())
    model = Transformer(Config(vocab_size=101), group)
    words = torch.randint(101, (8, 3), generator=torch.Generator().manual_seed(1))
    model.loss(words, words).backward()
    norm = model.clip_gradients(0.5)
    after = model.clip_gradients(0.5)
    copies = [weight.grad for weight in model.parameters() if not hasattr(weight, "is_part")]
    return {
        "parameters": parameters,
        "norm": norm.item(),
        "clipped": after.item(),
        "copies": nn.utils.parameters_to_vector(copies),
    }


@pytest.mark.parametrize("size", SPLIT)
def test_the_transformer_has_the_experiments_parameters_on_each_rank(size: int) -> None:
    assert [of[size]["parameters"] for of in on_groups()] == [SPLIT[size]] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_the_norm_that_clips_gradients_is_that_of_one_rank(size: int) -> None:
    for of in on_groups():
        assert of[size]["norm"] == pytest.approx(of[1]["norm"], rel=1e-5)
        assert of[size]["clipped"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_not_split_has_the_gradients_of_one_rank_on_every_rank(size: int) -> None:
    for of in on_groups():
        torch.testing.assert_close(of[size]["copies"], of[1]["copies"], rtol=1e-4, atol=1e-7)
