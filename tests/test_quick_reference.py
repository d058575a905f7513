"""The quick reference: all of its code on ranks, its commands, and its layouts at scale."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from page_runs import run_command, run_python
from pages import Block, blocks_of, commands_of, statements_of

from mcore_lab import cpu
from mcore_lab.config import Recipe
from mcore_lab.layout.words import in_words, sizes_in_use
from mcore_lab.recipes import find_recipe
from mcore_lab.runtime import launch

RECIPES = Path(__file__).parents[1] / "recipes"
PAGE = RECIPES / "quick_reference.md"
BLOCKS = blocks_of(PAGE)
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    pytest.param(*pair, id=f"line {block.line}: {pair[0]:.60}")
    for block in BLOCKS
    if block.language == "console"
    for pair in commands_of(block)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that runs a page's blocks of so many ranks, once."""
    return functools.cache(lambda ranks: run_python(PAGE, ranks, tmp_path_factory.mktemp("page")))


@pytest.mark.parametrize(
    "block",
    [block for block in PYTHON if "imports" not in block.where],
    ids=lambda block: f"line {block.line}: {block.section}",
)
def test_the_code_does_what_the_page_says(block: Block, run) -> None:
    assert "\n".join(run(block.ranks)[block.line]) == ""


@pytest.mark.parametrize(("command", "says"), COMMANDS)
def test_the_command_prints_what_the_page_says(
    command: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    status, printed = run_command(command)
    assert printed.rstrip() == says.rstrip()
    assert status == (2 if "broken rule" in says else 0)


def test_no_code_of_the_page_is_left_out() -> None:
    assert {block.language for block in BLOCKS} == {"python", "console"}
    for block in PYTHON:
        written = re.findall(r"#[\s\d.]*(?:->|raises )", block.code)
        held = [expected for one in statements_of(block) for expected in one.expected]
        assert len(written) == sum(bool(expected.kind) for expected in held), block.code


WRONG = """
<!-- imports -->
```python
import os
```

## Wrong

<!-- ranks: 2, alone -->
```python
1 + 1  # -> 3
1 + 1  # -> 2
os.environ["RANK"]  # -> "0" | "0"
os.environ["RANK"]  # -> "0" | "1"
(1, [2.0])  # -> (1, [2.5])
(1, [2.0000001])  # -> (1, [2.0])
True  # -> 1
int("a")  # raises ValueError: of course
int("a")  # raises ValueError: ...literal... 'a'
len([])  # raises ValueError: ...
len([])  # 0.1
len([])  # 0.1 -> 0
missing  # 0.1
missing
# ->
#    7
```
"""


def test_what_a_page_says_wrongly_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(WRONG)
    (found,) = run_python(page, 2, tmp_path).values()
    lines = {
        rank: [int(n) for n in re.findall(rf"line (\d+), rank {rank}:", "\n".join(found))]
        for rank in (0, 1)
    }
    first = 11
    wrong = [0, 4, 6, 7, 9, 10, 11, 13]
    assert lines[0] == [first + n for n in wrong]
    assert lines[1] == sorted([*lines[0], first + 2])


# Layouts by the size of the model.

ROW = re.compile(r"\| \[[\w.]+\]\(scale/([\w.]+)\.toml\) \|(.*)\|")
ROWS = {
    name: [cell.strip() for cell in cells.split("|")]
    for name, cells in ROW.findall(PAGE.read_text(encoding="utf-8"))
}


def scaled(name: str) -> tuple[Recipe, int]:
    """Return a recipe of the table, and the GPUs that it is for."""
    return find_recipe(str(RECIPES / "scale" / f"{name}.toml")), gpus(name)


def gpus(name: str) -> int:
    return int(ROWS[name][1].replace(",", ""))


@functools.cache
def counted() -> dict[str, list[str]]:
    """Return what the table has to say of parameters and bytes, by the name of the recipe."""
    found: dict[str, list[str]] = {}
    for of_rank in launch(count_every_other, 2, timeout=120):
        found |= of_rank
    return found


def count_every_other() -> dict[str, list[str]]:
    import os

    cpu.enable()
    from parameter_counts import of_the_fullest_rank, of_the_model

    found = {}
    for name in sorted(ROWS)[int(os.environ["RANK"]) :: 2]:
        recipe, world_size = scaled(name)
        whole, held = of_the_model(recipe), of_the_fullest_rank(recipe, world_size)
        size = held.bytes_on(recipe.layout, world_size)
        found[name] = [f"{whole.all / 1e9:,.2f}", f"{held.all / 1e9:.2f}", f"{size / 2**30:.1f}"]
    return found


def test_the_table_has_every_recipe_from_one_billion_parameters_to_a_thousand() -> None:
    assert sorted(ROWS) == sorted(path.stem for path in (RECIPES / "scale").glob("*.toml"))
    assert len(ROWS) >= 16
    sizes = [float(cells[0].replace(",", "")) for cells in ROWS.values()]
    assert min(sizes) < 2 and max(sizes) > 1000
    assert {8, 1024} <= {gpus(name) for name in ROWS} <= set(range(8, 1025))


@pytest.mark.parametrize("name", ROWS)
def test_the_layout_at_scale_passes_the_check(name: str) -> None:
    status, printed = run_command(
        f"mcore-lab check {RECIPES / 'scale' / name}.toml --nproc {gpus(name)}"
    )
    assert (status, printed.partition(": ")[2].partition("\n")[0]) == (0, "ok")


@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_what_megatron_core_builds_on_that_many_ranks(name: str) -> None:
    recipe, world_size = scaled(name)
    sizes = sizes_in_use(recipe.layout, world_size)
    assert sizes.pop("distopt")
    parameters, _, layout, held, gib, *_ = ROWS[name]
    assert layout == in_words(sizes)
    assert [parameters, held, gib] == counted()[name]
