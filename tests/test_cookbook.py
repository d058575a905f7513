"""The cookbook: it has all that there is to run, with the ranks that each is made for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_runs import run_command, type_line

from mcore_lab.cli.arguments import usual_world
from mcore_lab.cli.bench import BENCHMARKS
from mcore_lab.lessons import LESSONS
from mcore_lab.recipes import load_recipe, recipe_names

FOLDER = Path(__file__).parents[1] / "recipes"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| `([^`]+)` \| (\d+) \| ([\d.]+) \| ([^|]+) \|$", re.M)
ROWS = {name: (command, int(ranks)) for name, _, command, ranks, _, _ in ROW.findall(TEXT)}


BENCHES = re.findall(r"^\| `(mcore-lab bench [^`]+)`", TEXT, re.M)


def test_every_recipe_has_a_row_and_no_other() -> None:
    assert sorted(ROWS.keys() - LESSONS.keys()) == recipe_names()


def test_every_lesson_has_a_row_in_the_order_to_read_them() -> None:
    assert [name for name in ROWS if name in LESSONS] == list(LESSONS)


@pytest.mark.parametrize("name", ROWS)
def test_the_row_has_the_command_and_the_ranks_that_it_is_made_for(name: str) -> None:
    command, ranks = ROWS[name]
    assert f"{command} ".startswith(f"mcore-lab run {name} ")
    assert ranks == (LESSONS[name] if name in LESSONS else usual_world(load_recipe(name)))


def test_every_benchmark_and_every_file_has_a_row() -> None:
    assert sorted({command.split()[2] for command in BENCHES}) == sorted(BENCHMARKS)
    files = re.findall(r"^\| `(\w+\.toml)`", TEXT, re.M)
    assert sorted(files) == sorted(path.name for path in FOLDER.glob("*.toml"))


def test_the_recipes_benchmark_refuses_a_name_that_is_not_there() -> None:
    status, said = run_command("mcore-lab bench recipes tensor_paralel")
    assert status == 2
    assert said.startswith(
        "error: no recipe or lesson tensor_paralel; did you mean tensor_parallel"
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", [*(command for command, _ in ROWS.values()), *BENCHES])
def test_the_command_of_the_row_runs_in_an_empty_folder(command: str, tmp_path: Path) -> None:
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "one.txt").write_text("All that the ranks hold is one model.\n" * 2000)
    done = type_line(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
def test_the_recipes_benchmark_times_a_recipe_and_a_lesson() -> None:
    status, said = run_command("mcore-lab bench recipes tp_mlp tensor_parallel")
    rows = dict(re.findall(r"^(\w+) +2 ranks +([\d.]+) s$", said, re.M))
    assert status == 0 and rows.keys() == {"tp_mlp", "tensor_parallel"}
    assert all(float(seconds) > 0 for seconds in rows.values())
    assert re.search(r"^on \d+ cores? of .*\n.* Python 3", said, re.M)
