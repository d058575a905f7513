"""Every lesson: short enough to be read, and it runs wherever a person may start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_lab import cli, lessons
from mcore_lab.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent.parent
FOLDER = REPOSITORY / "mcore_lab" / "lessons"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_lesson_has_less_than_200_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_a_lesson_says_why_what_to_look_at_and_where_it_is_from(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8").partition('"""\n\nfrom ')[0]
    for part in ("\nWhy: ", "\nWhat to look at: ", "\nSource: "):
        assert part in text
    assert lessons.describe(name).endswith(".") and len(lessons.describe(name)) < 100


@pytest.mark.parametrize("nproc", [(), ("--nproc", "1")], ids=["usual", "alone"])
@pytest.mark.parametrize("name", lessons.LESSONS)
def test_a_lesson_runs_by_its_name_and_speaks(
    name: str, nproc: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", name, *nproc, *SMALL.get(name, ())]) == 0
    told = capfd.readouterr()
    assert told.out.count("\n") > 3 and not told.err


SMALL = {
    "collectives": ("--numbers", "1000"),
    "data_parallel": ("--hidden-size", "64", "--overlap"),
    "transformer": ("--steps", "5"),
    "pipeline_parallel": ("--hidden-size", "32"),
    "ring_attention": ("--sequence-length", "64"),
    "expert_parallel": ("--tokens", "32"),
}
"""What makes a lesson quick; a lesson that is not here is quick as it is."""


def test_under_torchrun_each_rank_is_one_of_its_processes_and_json_is_all_that_is_printed() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "mcore_lab.lessons.collectives", "--numbers", "3", "--json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert found["collectives"]["all_reduce"] == [[[0, 1], [10, 12]], [[10, 11], [10, 12]]]
    # A ring of two: the first sends chunks of two numbers and of one.
    assert found["bytes_sent_by_ring"] == 12


def test_a_lesson_that_is_run_alone_has_one_rank_and_imports_no_megatron_core() -> None:
    program = (
        "import runpy, sys; sys.argv = ['collectives', '--json']\n"
        "runpy.run_module('mcore_lab.lessons.collectives', run_name='__main__')\n"
        "assert not [name for name in sys.modules if name.startswith('megatron')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["collectives"]["broadcast"] == [[[0], [0]]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["colectives"], "no recipe or lesson colectives; did you mean collectives?"),
        (["collectives", "--numbrs", "2"], "unknown option --numbrs; did you mean --numbers"),
        (["collectives", "--numbers", "few"], "--numbers expects a whole number; got few"),
        (["collectives", "--nproc", "0"], "--nproc must not be below 1; it is 0"),
        (["collectives", "--numbers", "3"], "a ring of 4 ranks cuts the tensor into 4 chunks"),
        (["zero", "--lr", "-1"], "--lr must not be below 0; it is -1.0"),
        (["data_parallel", "--batch-size", "7"], "2 ranks cannot share --batch-size 7 evenly; 8"),
        (
            ["transformer", "--nproc", "3"],
            "--num-attention-heads must be a multiple of 3, the ranks; it is 4",
        ),
    ],
)
def test_what_a_person_got_wrong_is_told_in_one_line(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *words]) == 2
    told = capfd.readouterr()
    assert told.err.startswith(f"error: {message}") and told.err.count("\n") == 1
    assert not told.out


@pytest.mark.parametrize("start", ["mcore_lab run collectives", "mcore_lab.lessons.collectives"])
def test_a_reader_that_leaves_early_is_no_error(start: str) -> None:
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", *start.split()]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=pipe, stdout=pipe, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_lesson_that_is_not_there_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"no lesson colective; did you mean collectives\?"):
        lessons.load_lesson("colective")
