"""A run that goes on on other layouts: two tensor-parallel ranks, two stages, then one rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import changed, losses, run

from mcore_lab.cli.arguments import usual_world
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import load_recipe
from mcore_lab.training import RunFolder

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
LAB = [sys.executable, "-m", "mcore_lab"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SCHEDULE = {"steps": 6, "lr_warmup_steps": 1, "lr_decay_style": "cosine"}
SMALL = [
    *["--model.num-layers", "2", "--model.hidden-size", "32", "--data.sequence-length", "16"],
    *[word for name, value in SCHEDULE.items() for word in (f"--training.{name}", str(value))],
]
RUN_DIR = "runs/reshard_gpt"


def finish(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one rank that is never stopped."""
    recipe = changed(
        replace(load_recipe("reshard_gpt"), name="tp2_gpt", layout=ParallelLayout()),
        model={"num_layers": 2, "hidden_size": 32},
        data={"sequence_length": 16},
        training=SCHEDULE,
    )
    return losses(run(recipe, 1, tmp_path_factory.mktemp("one_rank") / "run"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, finish(folder, *LAB, "run", "reshard_gpt", "--nproc", "2", *SMALL, "--json")


def require_legs(answer: dict[str, Any]) -> None:
    """Hold that the summary says where each leg ran, and as a whole what the last one came to."""
    steps = [(leg["layout"], leg["ranks"], leg["steps"]) for leg in answer["legs"]]
    assert steps == [("tp2", 2, 2), ("pp2", 2, 4), ("nothing split", 1, 6)]
    assert [leg["checkpoint"] for leg in answer["legs"]] == [
        f"{RUN_DIR}/checkpoints/step-0000000{step}" for step in (2, 4, 6)
    ]
    last = answer["legs"][-1]
    assert {name: last[name] for name in ("run_dir", "steps", "loss", "checkpoint")}.items() <= (
        answer.items()
    )


def test_the_losses_of_all_legs_are_those_of_one_rank_that_is_never_stopped(
    finished: Any, one_rank: list[float]
) -> None:
    folder, done = finished
    assert done.returncode == 0 and done.stderr == ""
    metrics = RunFolder(folder / RUN_DIR).metrics()
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert losses(metrics) == pytest.approx(one_rank, rel=1e-5)
    require_legs(json.loads(done.stdout))


def test_torchrun_goes_through_the_same_legs(tmp_path: Path, one_rank: list[float]) -> None:
    done = finish(tmp_path, *TORCHRUN, "-m", "mcore_lab.recipes.reshard_gpt", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    assert losses(RunFolder(tmp_path / RUN_DIR).metrics()) == pytest.approx(one_rank, rel=1e-5)
    require_legs(json.loads(done.stdout))
    logs = sorted(path.name for path in (tmp_path / RUN_DIR / "logs").iterdir())
    assert logs == ["rank-0.log", "rank-1.log"]


def test_the_legs_that_are_left_are_run(
    finished: Any, tmp_path: Path, one_rank: list[float]
) -> None:
    """As after an end in the second leg: its checkpoint and that of the third are not there."""
    shutil.copytree(finished[0] / RUN_DIR, tmp_path / RUN_DIR)
    for step in (4, 6):
        shutil.rmtree(tmp_path / RUN_DIR / "checkpoints" / f"step-0000000{step}")
    again = [*LAB, "run", "reshard_gpt", "--nproc", "2", *SMALL, "--training.resume", "auto"]
    done = finish(tmp_path, *again, "--json")
    assert done.returncode == 0, done.stderr
    assert [leg["layout"] for leg in json.loads(done.stdout)["legs"]] == ["pp2", "nothing split"]
    assert losses(RunFolder(tmp_path / RUN_DIR).metrics()) == pytest.approx(one_rank, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["--nproc", "3"],
            [
                "error: reshard_gpt, leg 1 of 3, on 3 ranks: 1 broken rule",
                "  world size must be a multiple of tp * cp * pp: "
                "world size 3, tp * cp * pp = 2 * 1 * 1 = 2; "
                "use --layout.tp 1 or 3, or 2 or 4 ranks",
                "reshard_gpt, leg 2 of 3, on 3 ranks: 1 broken rule",
                "  world size must be a multiple of tp * cp * pp: "
                "world size 3, tp * cp * pp = 1 * 1 * 2 = 2; "
                "use --layout.pp 1 or 3, or 2 or 4 ranks",
            ],
        ),
        (
            ["--nproc", "2", "--checkpoint.save", "False"],
            [
                "error: reshard_gpt goes on from its own checkpoints: "
                "without --checkpoint.save False"
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_leg_is_told_before_anything_starts(
    tmp_path: Path, words: list[str], lines: list[str]
) -> None:
    done = finish(tmp_path, *LAB, "run", "reshard_gpt", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == lines
    assert list(tmp_path.iterdir()) == []


# The other commands.


def test_recipes_lists_it_with_the_ranks_that_it_begins_on() -> None:
    assert usual_world(load_recipe("reshard_gpt")) == 2


def test_check_tells_of_every_leg(tmp_path: Path) -> None:
    done = finish(tmp_path, *LAB, "check", "reshard_gpt")
    heads = [line for line in done.stdout.splitlines() if line.endswith(": ok")]
    assert heads == [
        f"reshard_gpt, leg {number} of 3, on {ranks}: ok"
        for number, ranks in enumerate(("2 ranks", "2 ranks", "1 rank"), start=1)
    ]
    answer = json.loads(finish(tmp_path, *LAB, "check", "reshard_gpt", "--json").stdout)
    assert answer["ok"] and answer["sizes"]["tp"] == 2
    assert [leg["sizes"]["pp"] for leg in answer["legs"]] == [1, 2, 1]
    odd = ["--model.num-layers", "3", "--json"]
    answer = json.loads(finish(tmp_path, *LAB, "check", "reshard_gpt", *odd).stdout)
    assert [leg["ok"] for leg in answer["legs"]] == [True, False, True] and not answer["ok"]


def test_ranks_shows_where_it_begins_and_says_what_follows(tmp_path: Path) -> None:
    done = finish(tmp_path, *LAB, "ranks", "reshard_gpt")
    assert done.stdout.endswith("\nand then pp2 on 2 ranks, then nothing split on 1 rank\n")


def test_verify_names_what_to_verify_instead(tmp_path: Path) -> None:
    done = finish(tmp_path, *LAB, "verify", "reshard_gpt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: reshard_gpt goes through several layouts")
