"""`mcore-lab verify` as a person and as a program call it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mcore_lab.cli import main
from mcore_lab.model import gpt_chunk

SMALL = [
    *("--model.hidden-size", "32", "--model.num-layers", "2", "--model.vocab-size", "128"),
    *("--data.sequence-length", "16", "--data.global-batch-size", "4", "--steps", "2"),
]
SCALED = "decoder.layers.1.self_attention.linear_qkv.weight"


def scaled_on_several_ranks(*arguments: Any) -> Any:
    """Build the GPT, with one gradient 1 % too large where there is more than one rank."""
    chunk = gpt_chunk(*arguments)
    if dist.get_world_size() > 1:
        for name, parameter in chunk.named_parameters():
            if name == SCALED:
                parameter.register_hook(lambda gradient: 1.01 * gradient)
    return chunk


@pytest.fixture
def wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from mcore_lab.verify import run

    wrong = functools.partial(run.verify, build=scaled_on_several_ranks, timeout=100)
    monkeypatch.setattr(run, "verify", wrong)


def test_a_right_layout_is_told_kind_by_kind_and_exits_0(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert main(["verify", "tp2_gpt", "--sp", *SMALL, "--html", str(page)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert " ".join(lines[0].split()) == "kind comparisons off worst error tolerance where"
    rows = {line[:18].strip(): line[18:].split() for line in lines[1 : lines.index("")]}
    assert {"activation", "loss", "gradient", "grad norm", "moment exp_avg", "weight"} <= set(rows)
    assert rows["loss"][0] == "4" and rows["grad norm"][0] == "2"
    for comparisons, off, worst, tolerance, *_ in rows.values():
        assert int(comparisons) > 0 and off == "0" and float(worst) <= float(tolerance)
    total = sum(int(row[0]) for row in rows.values())
    conclusion = "tp2_gpt on 2 ranks (tp2 sp) computes what one rank computes: "
    assert lines[-1] == f"{conclusion}{total} comparisons"
    assert said.err.endswith(f"written to {page}\n") and lines[-1] in page.read_text()


@pytest.mark.usefixtures("wrong_layout")
def test_a_wrong_layout_is_named_by_its_first_tensor_and_ratio_and_exits_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", "tp2_gpt", *SMALL]) == 1
    said = capsys.readouterr()
    assert "error:" not in said.err
    conclusion = said.out.splitlines()[-1]
    assert conclusion.startswith(
        f"tp2_gpt on 2 ranks (tp2) is wrong: first gradient {SCALED}: "
        "off by 1.0e-02, norm 1.01 times the reference's; "
    )
    gradients = next(line for line in said.out.splitlines() if line.startswith("gradient"))
    assert gradients.split()[2] == "1" and gradients.endswith(SCALED)


@pytest.mark.usefixtures("wrong_layout")
def test_json_holds_every_verdict_and_nothing_else_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", "tp2_gpt", *SMALL, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is False and answer["first"]["name"] == SCALED
    assert answer["first"]["ratio"] == pytest.approx(1.01, rel=1e-5)
    assert answer["layout"] == {"tp": 2} and answer["world_size"] == 2 and answer["steps"] == 2
    counts = {kind["kind"]: (kind["comparisons"], kind["off"]) for kind in answer["kinds"]}
    for kind, count in counts.items():
        verdicts = [verdict for verdict in answer["verdicts"] if verdict["kind"] == kind]
        assert count == (len(verdicts), sum(not verdict["passed"] for verdict in verdicts))
    assert counts["gradient"][1] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tp_mlp"], "tp_mlp shows a layer and holds it against one rank itself"),
        (["tp2_gpt", "--tp", "3", "--nproc", "2"], "tp2_gpt on 2 ranks: 4 broken rules\n"),
        (
            ["tp2_gpt", "--model.transformer.hidden-dropout", "0.1"],
            "layouts draw dropout differently",
        ),
        (["tp2_gpt", "--training.lr", "-1"], "--training.lr"),
        (["tp2_gpt", "--steps", "0"], "--steps expects 1 or more; got 0"),
        (["tp2_gpt", "--steps", "few"], "--steps expects a whole number; got few"),
        (["tp2_gpt", "--html", "no/page.html"], "--html no/page.html: there is no folder no"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("mcore_lab.verify.run.launch", launch)
    assert main(["verify", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}") and not said.out
