"""The public API: what is listed, what is documented, and that listing it costs nothing."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from page_runs import run_python, run_script
from pages import blocks_of

import mcore_lab
from mcore_lab import errors
from mcore_lab.errors import LabError

PAGE = Path(__file__).parents[1] / "recipes" / "python.md"
TEXT = PAGE.read_text(encoding="utf-8")
MODULES = ("cpu", "runtime", "verify")
PUBLIC = [
    *((name, getattr(mcore_lab, name)) for name in mcore_lab.__all__ if name != "__version__"),
    *(
        (f"{module}.{name}", getattr(importlib.import_module(f"mcore_lab.{module}"), name))
        for module in MODULES
        for name in importlib.import_module(f"mcore_lab.{module}").__all__
    ),
]
SCRIPTS = [block for block in blocks_of(PAGE) if block.is_script]


def test_the_page_lists_what_all_lists() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    assert sorted([*rows, "__version__"]) == mcore_lab.__all__
    assert "`mcore_lab.__version__`" in TEXT


def test_a_star_import_gives_every_name() -> None:
    names: dict[str, Any] = {}
    exec("from mcore_lab import *", names)
    assert set(mcore_lab.__all__) <= names.keys()
    assert set(mcore_lab.__all__) <= set(dir(mcore_lab))
    with pytest.raises(AttributeError, match="has no attribute 'lunch'"):
        _ = mcore_lab.lunch


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_the_name_has_a_docstring_of_its_own(name: str, value: Any) -> None:
    assert value.__doc__ and not value.__doc__[0].isspace(), name
    if inspect.isclass(value):
        # Not the signature that a dataclass is given for want of a docstring.
        assert not value.__doc__.startswith(f"{value.__name__}("), name


RAISING = re.findall(r"^\| `(\w+)` \|[^|]*\| (`\w+`[^|]*) \|$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize(("name", "raised"), RAISING, ids=[name for name, _ in RAISING])
def test_what_the_page_says_is_raised_is_in_the_docstrings(name: str, raised: str) -> None:
    value = getattr(mcore_lab, name)
    parts = vars(value).values() if inspect.isclass(value) else ()
    if inspect.ismodule(value):
        parts = [getattr(value, part) for part in value.__all__]
    said = " ".join(inspect.getdoc(one) or "" for one in (value, *parts))
    for error in re.findall(r"`(\w+)`", raised):
        assert re.search(rf"\b{error}\b", said), error


def test_the_page_has_every_error_with_its_exit_status() -> None:
    family = [one for one in vars(errors).values() if inspect.isclass(one)]
    public = {one.__name__: one.exit_code for one in family if issubclass(one, LabError)}
    rows = re.findall(r"^\| `(\w+Error)` \|.*\| (\d+) \|$", TEXT, flags=re.MULTILINE)
    assert {name: int(status) for name, status in rows} == public


def test_importing_the_package_and_its_plain_parts_imports_no_torch() -> None:
    plain = [name for name, value in PUBLIC if "." not in name and not inspect.ismodule(value)]
    code = f"import sys; from mcore_lab import {', '.join(plain)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_code_does_what_the_page_says(tmp_path: Path) -> None:
    found = run_python(PAGE, 1, tmp_path)
    assert len(found) == 1
    assert "\n".join(line for lines in found.values() for line in lines) == ""


@pytest.mark.slow
@pytest.mark.parametrize("block", SCRIPTS, ids=lambda block: f"line {block.line}: {block.section}")
def test_the_script_prints_what_the_page_says(block: Any, tmp_path: Path) -> None:
    (says,) = re.findall(r"print\(.*\)  # (.*)", block.code)
    assert run_script(block.code, tmp_path) == f"{says}\n"
