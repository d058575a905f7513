"""Every layout of a number of ranks is there, once, and a sweep goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mcore_lab.cli import main
from mcore_lab.layout import ParallelLayout
from mcore_lab.verify.layouts import allowed_layouts, layouts_of
from mcore_lab.verify.sweep import DENSE, MOE, Outcome, Sweep, fewest_samples, smallest, sweep


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("experts", [False, True])
def test_layouts_are_different_and_fill_the_world(world_size: int, experts: bool):
    layouts = list(layouts_of(world_size, experts=experts))
    assert len(set(layouts)) == len(layouts)
    for layout in layouts:
        assert world_size % (layout.tp * layout.cp * layout.pp) == 0
        assert world_size % (layout.etp * layout.ep * layout.pp) == 0


def test_the_layouts_of_two_ranks_are_those_that_one_writes_by_hand():
    base = ParallelLayout()
    expected = {
        replace(base, use_distributed_optimizer=split).resized(**sizes)
        for split in (False, True)
        for sizes in ({}, {"cp": 2})
    }
    expected |= {base.resized(tp=2), base.resized(tp=2, sp=True)}
    expected |= {base.resized(pp=2), base.resized(pp=2, vpp=2)}
    assert set(layouts_of(2, experts=False)) == expected


@pytest.mark.parametrize("recipe", [DENSE, MOE], ids=["dense", "moe"])
def test_what_is_not_allowed_breaks_a_rule(recipe):
    allowed, refused = allowed_layouts(recipe, 4)
    worlds = [
        (world, layout)
        for world in range(1, 5)
        for layout in layouts_of(world, experts=recipe is MOE)
    ]
    assert len(allowed) + refused == len(worlds)
    for world, layout in worlds:
        broken = layout.check(recipe.model, recipe.data, world)
        assert bool(broken) == ((world, layout) not in allowed)


def test_a_layout_is_swept_on_as_few_samples_as_show_it_and_the_rules_allow():
    base = ParallelLayout()
    assert fewest_samples(DENSE, 4, base.resized(tp=4)) == 2
    assert fewest_samples(DENSE, 8, base.resized(pp=4, tp=2)) == 4
    assert fewest_samples(DENSE, 8, base.resized(pp=2, tp=2)) == 4
    # No replica has less than a sample, nor a step more than the recipe's.
    assert fewest_samples(DENSE, 8, base) == 8
    for recipe in (DENSE, MOE):
        for world, layout in allowed_layouts(recipe, 8)[0]:
            data = replace(recipe.data, global_batch_size=fewest_samples(recipe, world, layout))
            assert not layout.check(recipe.model, data, world)


def test_the_small_models_have_two_layers_where_no_pipeline_splits_four():
    base = ParallelLayout()
    tp, pp = base.resized(tp=2), base.resized(pp=2)
    assert [smallest(MOE, 2, layout).model.num_layers for layout in (base, tp, pp)] == [2, 2, 4]
    # Any other model has the depth that it has: it may have a field for each layer.
    for change in ({"num_layers": 3}, {"hidden_size": 64}):
        other = replace(DENSE, model=replace(DENSE.model, **change))
        assert smallest(other, 2, tp).model == other.model


def test_a_sweep_verifies_every_layout_once_and_goes_on_where_it_was(tmp_path: Path):
    model = replace(DENSE.model, num_layers=1, num_attention_heads=1)
    recipe = replace(DENSE, model=model)
    *first, whole = sweep([recipe], 2, tmp_path, steps=1)
    assert isinstance(whole, Sweep)
    layouts = ["", "cp2", "cp2 distopt", "dp2", "dp2 distopt"]
    assert sorted(one.layout for one in first if isinstance(one, Outcome)) == layouts
    assert {one.status for one in first if isinstance(one, Outcome)} == {"passed"}
    assert whole.as_json()["summary"] == {
        "dense": {"passed": 5, "wrong": 0, "failed": 0, "refused": whole.refused["dense"]}
    }

    lines = (next(tmp_path.glob("dense-*")) / "outcomes.jsonl").read_text().splitlines()
    (next(tmp_path.glob("dense-*")) / "outcomes.jsonl").write_text("\n".join(lines[:4]) + "\n")
    *again, _ = sweep([recipe], 2, tmp_path, steps=1)
    known = {one.layout: one for one in first if isinstance(one, Outcome)}
    same = [one for one in again if isinstance(one, Outcome) and one == known[one.layout]]
    assert len(again) == 5 and len(same) >= 4


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    words = ["verify", "--sweep", "dense", "--world", "1"]
    assert main([*words, "--folder", str(tmp_path / "file")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: cannot keep what is found in {tmp_path}/file/dense-")
    assert said.err.count("\n") == 1 and said.out == ""
    assert main([*words, "--folder", str(tmp_path), "--svg", f"{tmp_path}/no/matrix.svg"]) == 2
    assert capsys.readouterr().err == (
        f"error: --svg {tmp_path}/no/matrix.svg: there is no folder {tmp_path}/no\n"
    )
    assert main([*words, "--folder", str(tmp_path), "--svg", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --svg {tmp_path}: it is a folder; name a file in it\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_options_of_a_recipe_hold_for_every_model_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["verify", "--sweep", "dense", "--world", "1", "--folder", str(tmp_path), "--json"]
    assert main([*words, "--model.num-layers", "3", "--steps", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    command = "mcore-lab verify --sweep dense --world 1 --steps 1 --model.num-layers 3"
    assert answer["command"] == command
    assert answer["summary"]["dense"]["passed"] == 1
    comparisons = int(answer["outcomes"][0]["conclusion"].split()[-2])
    assert main([*words, "--steps", "1"]) == 0
    of_two_layers = json.loads(capsys.readouterr().out)["outcomes"][0]["conclusion"]
    assert comparisons > int(of_two_layers.split()[-2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout.tp", "2"], "--layout.tp: a sweep tries every layout; leave it out"),
        (["--model.num-layer", "2"], "unknown option --model.num-layer; did you mean"),
        (["--model.transformer.hidden-dropout", "0.1"], "layouts draw dropout differently"),
        (["tp_mlp"], "tp_mlp shows a layer and holds it against one rank itself"),
    ],
)
def test_what_a_sweep_cannot_take_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert main(["verify", "--sweep", "--folder", str(tmp_path), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}") and not said.out
    assert not list(tmp_path.iterdir())


def test_an_unfinished_line_of_a_sweep_that_was_killed_is_forgotten(tmp_path: Path):
    (first, _) = sweep([DENSE], 1, tmp_path, steps=1)
    file = next(tmp_path.glob("dense-*")) / "outcomes.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"recipe": "den')
    (again, _) = sweep([DENSE], 1, tmp_path, steps=1)
    assert again == first
    assert file.read_text() == whole


@contextlib.contextmanager
def sweep_under_way(folder: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    """Give a sweep that has verified its first layout; afterwards nothing of it is left."""
    words = [sys.executable, "-m", "mcore_lab", "verify", "--sweep", "dense", "--world", "2"]
    process = subprocess.Popen(
        [*words, "--workers", str(workers), "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family: list[psutil.Process] = []
    try:
        assert process.stdout and process.stdout.readline().startswith("1/")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= workers
        yield process
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        for one in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_ends_at_once_and_leaves_no_worker(
    tmp_path: Path, number: int, status: int
):
    with sweep_under_way(tmp_path, 2) as process:
        # As a terminal does for Ctrl-C, and as `kill` does.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == status
        assert said == ("error: interrupted\n" if number == signal.SIGINT else "")


def test_a_worker_that_is_killed_is_told_in_a_line(tmp_path: Path):
    with sweep_under_way(tmp_path, 1) as process:
        [worker] = psutil.Process(process.pid).children()
        worker.kill()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert said.startswith("error: a worker of the sweep was killed; the same command goes on")
        assert said.count("\n") == 1
