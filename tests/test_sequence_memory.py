"""The sequence-memory task: its data, attention that sees all of a sequence, and the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from one_rank import OneRank
from small_runs import SMALL, changed

from mcore_lab.cli import main
from mcore_lab.config import Data, Recipe
from mcore_lab.data.datasets import build_datasets
from mcore_lab.data.memory import SequenceMemory


def memory(length: int = 16, **model: Any) -> Recipe:
    return changed(
        SMALL,
        model={"num_layers": 2, "causal_attention": False, **model},
        data={"sequence_length": length, "memory_sequences": 10, "mock_vocab_size": 127},
        training={"steps": 3},
    )


def test_the_sequences_are_fixed_and_each_token_is_its_own_label() -> None:
    data = Data(memory_sequences=100, sequence_length=32, mock_vocab_size=1023)
    built = build_datasets(data)
    assert isinstance(built.train, SequenceMemory)
    assert (len(built.train), built.vocab_size, built.valid) == (100, 1024, None)
    again = SequenceMemory(100, 32, 1024)
    for index in range(100):
        sample = built.train[index]
        assert torch.equal(sample["tokens"], again[index]["tokens"])
        assert torch.equal(sample["tokens"], sample["labels"])
        assert sample["position_ids"].tolist() == list(range(32))
    tokens = torch.stack([built.train[index]["tokens"] for index in range(100)])
    assert (int(tokens.min()), int(tokens.max())) == (0, 1023)
    assert len(tokens.unique()) > 900


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(memory(), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("layout", ["2 ranks: tp2 sp", "4 ranks: tp2 cp2"])
def test_attention_to_all_of_a_sequence_trains_as_on_one_rank(
    whole: OneRank, layout: str, tmp_path: Path
) -> None:
    assert whole.agrees_with(whole.on(layout, tmp_path))


def test_attention_to_all_of_a_sequence_is_not_causal(whole: OneRank, tmp_path: Path) -> None:
    causal = changed(whole.recipe, model={"causal_attention": True})
    assert not whole.agrees_with(small_runs.run(causal, 1, tmp_path / "run"))


def test_padding_would_be_attended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a rule refuses sequences that attention sees whole and the ranks cannot share."""
    uneven = OneRank(memory(length=13), tmp_path)
    assert not uneven.recipe.layout.check(uneven.recipe.model, uneven.recipe.data, 1)
    monkeypatch.setattr(small_runs, "require_startable", lambda *_: None)
    assert not uneven.agrees_with(uneven.on("2 ranks: tp2 sp", tmp_path))


SMALL_OPTIONS = {
    "model.num-layers": 2,
    "model.hidden-size": 64,
    "model.num-attention-heads": 4,
    "model.ffn-hidden-size": 128,
    "model.vocab-size": 128,
    "model.max-sequence-length": 16,
    "data.sequence-length": 16,
    "data.mock-vocab-size": 127,
    "data.memory-sequences": 10,
    "training.steps": 4,
}


def test_every_implementation_learns_the_same_on_1_2_and_4_ranks_and_holds_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "sequence_memory", "--compare", "--run-dir", str(tmp_path)]
    words += [word for name, value in SMALL_OPTIONS.items() for word in (f"--{name}", str(value))]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((tmp_path / "comparison.json").read_text())
    ways = [(row["implementation"], row["ranks"]) for row in rows]
    assert ways == [
        *(("from scratch", ranks) for ranks in (1, 2, 4)),
        *(("Megatron-Core", ranks) for ranks in (1, 2, 4)),
        *(("Megatron-Core, sp", ranks) for ranks in (2, 4)),
        *(("Megatron-Core, sp, distopt", ranks) for ranks in (2, 4)),
    ]
    for row in rows:
        assert len(row["losses"]) == 4
        assert row["apart"] < 1e-4
        if row["ranks"] == 1:
            one = row
        else:
            assert row["parameters"] < one["parameters"]
            assert row["saved"] == 1 - row["peak_bytes"] / one["peak_bytes"] > 0.2
    assert main(words) == 2
    assert "holds a comparison: --fresh makes it anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["tp2_gpt", "--compare"], "tp2_gpt compares nothing: --compare is for sequence_memory"),
        (["sequence_memory", "--compare", "--nproc", "2"], "leave them out"),
        (["sequence_memory", "--compare", "--layout.tp", "2"], "leave them out"),
        (
            ["sequence_memory", "--layout.tp", "2", "--layout.sp", "--data.sequence-length", "31"],
            "or attention that is not causal sees padding",
        ),
        (["sequence_memory", "--data.path", "README.md"], "leave one of them out"),
    ],
)
def test_what_cannot_be_compared_or_learnt_is_said_in_a_line(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert "Traceback" not in said
