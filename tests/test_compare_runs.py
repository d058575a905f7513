"""`mcore-lab compare`: from which step on two runs differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, run

from mcore_lab import cpu
from mcore_lab.cli import main
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.recipes import load_recipe
from mcore_lab.report.divergence import Divergence, divergence

cpu.preload()

RECIPE = load_recipe("tp2_gpt")


def lines(losses: Sequence[float], first: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": loss, "grad_norm": 2 * loss}
        for step, loss in enumerate(losses, first)
    ]


def written(folder: Path, losses: Sequence[float], recipe: Recipe = RECIPE, first: int = 1) -> str:
    """Write a run's folder by hand, and return its path."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
    text = "".join(json.dumps(line) + "\n" for line in lines(losses, first))
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def diverging_at(step: int, steps: int) -> Divergence:
    losses = [2.0] * steps
    others = [2.0 if number < step else 2.1 for number in range(1, steps + 1)]
    return divergence(lines(losses), lines(others), 1e-5)


# What is found.


def test_the_first_step_beyond_the_tolerance_is_named_for_each_quantity() -> None:
    one, other = lines([4.0, 3.0, 2.0, 1.0]), lines([4.0, 3.0 + 3e-6, 2.0 + 4e-5, 1.0])
    other[1]["grad_norm"] = 6.1
    loss, grad_norm = divergence(one, other, 1e-5).curves
    assert loss.differences == pytest.approx((0, 1e-6, 2e-5, 0), rel=1e-4)
    assert (loss.first_beyond, grad_norm.first_beyond) == (3, 2)
    assert loss.largest == (3, pytest.approx(2e-5)) and grad_norm.largest[0] == 2


def test_the_difference_is_relative_to_the_first_run_and_absolute_where_that_is_0() -> None:
    loss, _ = divergence(lines([4.0, 0.0]), lines([5.0, 0.5]), 1.0).curves
    assert loss.differences == (0.25, 0.5)


def test_a_loss_that_is_no_number_is_beyond_any_tolerance() -> None:
    found = divergence(lines([2.0, float("nan")]), lines([2.0, float("nan")]), 1e9)
    assert found.curves[0].first_beyond == 2 and not found.agrees
    assert found.curves[0].largest[0] == 2


def test_only_steps_that_both_runs_have_are_compared() -> None:
    found = divergence(lines([3.0, 2.0, 1.0]), lines([2.0, 1.0, 0.5], first=2), 0.0)
    assert found.steps == (2, 3) and found.agrees
    assert found.alone == ((1,), (4,))


def test_a_short_run_is_shown_whole_and_a_long_one_around_its_divergence() -> None:
    assert diverging_at(5, 24).telling_places() == list(range(24))
    shown = [place + 1 for place in diverging_at(500, 1000).telling_places()]
    assert shown == [1, 2, 3, *range(497, 504), 998, 999, 1000]
    assert diverging_at(2, 1000).telling_places() == [0, 1, 2, 3, 4, 997, 998, 999]


# What is told.


def test_two_layouts_of_one_recipe_agree_and_another_learning_rate_diverges_at_step_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = changed(SMALL, training={"steps": 3})
    runs = {
        "tp1": (one, 1),
        "tp2": (changed(one, layout={"tensor_model_parallel_size": 2}), 2),
        "fast": (changed(one, training={"lr": 2e-2}), 1),
    }
    for name, (recipe, nproc) in runs.items():
        run(recipe, nproc, tmp_path / name)
    tp1, tp2, fast = (str(tmp_path / name) for name in runs)

    assert main(["compare", tp1, tp2]) == 0
    said = capsys.readouterr().out
    assert "recipes differ" not in said
    assert "\nloss: within 1e-05 at every step; " in said
    assert "\ngrad norm: within 1e-05 at every step; " in said

    assert main(["compare", tp1, fast, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["first_beyond"] == {"loss": 2, "grad_norm": 2} and answer["agrees"] is False
    assert answer["recipes_differ_in"] == {"training.lr": [2e-3, 2e-2]}
    assert [step["loss_difference"] > 1e-5 for step in answer["steps"]] == [False, True, True]


def test_the_table_marks_where_a_run_diverges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [3.0 - 0.01 * step for step in range(100)]
    one = written(tmp_path / "one", losses)
    other = written(tmp_path / "other", [*losses[:49], *(loss * 1.5 for loss in losses[49:]), 1.0])
    assert main(["compare", one, other]) == 1
    said = capsys.readouterr().out.splitlines()
    (marked,) = (line for line in said if "<- first" in line)
    expected = "50 2.51 3.765 5.0e-01 <- first 5.02 7.53 5.0e-01 <- first"
    assert " ".join(marked.split()) == expected
    assert sum(line.startswith("…") for line in said) == 2
    assert f"only {other} has step 101" in said
    loss = next(line for line in said if line.startswith("loss: "))
    assert loss.startswith("loss: beyond 1e-05, first at step 50; largest relative difference 5.0e")
    assert not any(line.startswith("hint") for line in said)


def test_runs_that_began_with_other_weights_are_told_how_to_share_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = written(tmp_path / "one", [3.0]), written(tmp_path / "other", [3.1])
    assert main(["compare", one, other]) == 1
    assert "other weights or other samples" in capsys.readouterr().out
    assert main(["compare", one, other, "--tolerance", "0.1"]) == 0


def test_recipes_that_differ_are_compared_and_their_keys_are_named_but_not_the_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(RECIPE, data=replace(RECIPE.data, path="books"))
    other = replace(other.with_layout(sequence_parallel=True), name="sp2_gpt")
    words = [written(tmp_path / "one", [3.0]), written(tmp_path / "other", [3.0], other)]
    assert main(["compare", *words]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == (
        "the recipes differ in more than their layout: "
        "name tp2_gpt and sp2_gpt, data.path not set and books"
    )


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_written_with_both_names_and_the_step(tmp_path: Path, suffix: str) -> None:
    one = written(tmp_path / "one", [3.0, 2.0, 1.0])
    other = written(tmp_path / "other", [3.0, 2.5, float("nan")])
    picture = tmp_path / f"plot.{suffix}"
    assert main(["compare", one, other, "--plot", str(picture)]) == 1
    if suffix == "png":
        assert picture.read_bytes().startswith(b"\x89PNG")
        return
    # An SVG draws its text as shapes, each after a comment with the words.
    drawn = picture.read_text()
    for words in (one, other, "step 2", "tolerance 1e-05", "relative difference"):
        assert f"<!-- {words} -->" in drawn


def test_numbers_that_json_has_no_form_for_are_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = written(tmp_path / "one", [3.0]), written(tmp_path / "other", [float("nan")])
    assert main(["compare", one, other, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer["steps"][0]["loss"] == [3.0, "nan"]
    assert answer["steps"][0]["loss_difference"] == "nan"


# What is wrong.


def test_a_plot_without_matplotlib_is_refused_with_the_command_that_adds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one = written(tmp_path / "one", [3.0])
    assert main(["compare", one, one, "--plot", str(tmp_path / "plot.svg")]) == 2
    said = capsys.readouterr()
    assert said.err == "error: a plot needs matplotlib: pip install 'mcore-lab[plot]'\n"
    assert not said.out and not (tmp_path / "plot.svg").exists()


def test_what_cannot_be_compared_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = written(tmp_path / "tp2", [3.0, 2.0])
    later, empty = written(tmp_path / "later", [1.0], first=9), written(tmp_path / "empty", [])
    common = f"the runs have no step in common: {one} has steps 1-2 and {later} has step 9"
    cases = {
        (one, str(tmp_path / "tp")): f"no run in {tmp_path}/tp; did you mean {one} or",
        (one, later): common,
        (one, empty): f"no step is recorded in {empty}",
        (one,): "the following arguments are required: RUN",
        (one, later, "--tolerance", "-1"): "--tolerance expects 0 or more; got -1",
        (one, later, "--plot", "a.jpg"): "--plot a.jpg: a file that ends in .svg, .png, .pdf",
    }
    for words, message in cases.items():
        assert main(["compare", *words]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {message}"), words
        assert said.err.count("\n") == 1 and not said.out


def test_a_line_without_its_numbers_is_told_by_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = written(tmp_path / "a", [2.0, 1.0]), written(tmp_path / "b", [2.0, 1.0])
    for line, number, name in (('{"step": 3}', 3, "loss"), ("[]", 3, "step")):
        file = tmp_path / "b" / "metrics.jsonl"
        whole = file.read_text()
        file.write_text(whole + line + "\n")
        assert main(["compare", one, other]) == 2
        said = capsys.readouterr().err
        assert said == f"error: {file} is not of a run: line {number} has no number for {name}\n"
        file.write_text(whole)
