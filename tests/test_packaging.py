"""The wheel and the sdist: what is in them, and that they run where there is no checkout.

They are built as a release is, by `python -m build`, which needs the package index.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
ROOMS = {"docker", "mcore_lab", "recipes", "tests"}
BESIDE = {".gitignore", "LICENSE", "PKG-INFO", "noxfile.py", "pyproject.toml"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("build") is None,
        reason='needs the package build: pip install -e ".[dev]"',
    ),
]


def finish(words: Sequence[str | Path], folder: Path, minutes: float = 5) -> str:
    """Run a command in `folder`, where it finds nothing of the checkout; return what it printed."""
    done = subprocess.run(
        words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60 * minutes
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Built:
    """What `python -m build` made."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    finish([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


def sources() -> set[str]:
    """Return the files of the package, as a wheel names them."""
    found = (ROOT / "mcore_lab").rglob("*")
    return {
        str(path.relative_to(ROOT))
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    metadata = {name for name in names if name.startswith(f"mcore_lab-{VERSION}.dist-info/")}
    assert names - metadata == sources()
    assert "mcore_lab/py.typed" in names
    assert f"mcore_lab-{VERSION}.dist-info/licenses/LICENSE" in metadata
    assert built.wheel.name == f"mcore_lab-{VERSION}-py3-none-any.whl"


def test_the_sdist_is_what_a_checkout_holds_and_nothing_else(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.removeprefix(f"mcore_lab-{VERSION}/") for name in sdist.getnames()}
    of_rooms = {name for name in names if name.partition("/")[0] in ROOMS}
    beside = {name for name in names - of_rooms if not name.endswith(".md")}
    assert beside == BESIDE
    assert names >= sources() | {"CHANGELOG.md", "CONTRIBUTING.md", "README.md"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs/")]
    if (ROOT / ".git").exists():
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        assert names - {"PKG-INFO"} <= set(finish(listed, ROOT).splitlines())


def fresh_venv(folder: Path, *, dependencies_from_here: bool) -> Path:
    """Return the `bin` of a new venv, which may find what this environment has installed."""
    finish([sys.executable, "-m", "venv", folder], folder.parent)
    if dependencies_from_here:
        # A line in a .pth file, of which the .pth files of editable installs are not read.
        (packages,) = folder.glob("lib/python*/site-packages")
        here = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "here.pth").write_text("\n".join(here) + "\n")
    return folder / "bin"


def require_runs(tools: Path, elsewhere: Path) -> None:
    """Assert that what is installed is found in its venv, says its version, and trains."""
    python = tools / "python"
    place = finish([python, "-c", "import mcore_lab; print(mcore_lab.__file__)"], elsewhere)
    assert Path(place).is_relative_to(tools.parent)
    version = "import mcore_lab; print(mcore_lab.__version__)"
    assert finish([python, "-c", version], elsewhere) == f"{VERSION}\n"
    assert finish([tools / "mcore-lab", "--version"], elsewhere) == f"mcore-lab {VERSION}\n"
    said = finish([tools / "mcore-lab", "run", "tp2_gpt", "--nproc", "2"], elsewhere)
    assert "step 20/20" in said
    assert (elsewhere / "runs" / "tp2_gpt" / "checkpoints" / "step-00000020").is_dir()
    shown = finish([tools / "mcore-lab", "checkpoint", "show", "runs/tp2_gpt"], elsewhere)
    assert f"mcore_lab {VERSION}" in shown
    assert "tensor_parallel" in finish([python, "-m", "mcore_lab", "recipes"], elsewhere)


def test_the_wheel_runs_in_a_venv_of_its_own(built: Built, tmp_path: Path) -> None:
    tools = fresh_venv(tmp_path / "venv", dependencies_from_here=False)
    finish([tools / "python", "-m", "pip", "install", built.wheel], tmp_path, minutes=20)
    require_runs(tools, tmp_path)
    torchrun = [tools / "torchrun", "--nproc-per-node", "2", "-m", "mcore_lab.recipes.tp2_gpt"]
    assert "step 2/2" in finish([*torchrun, "--fresh", "--training.steps", "2"], tmp_path)


def test_the_sdist_installs_and_its_tests_run_from_it(built: Built, tmp_path: Path) -> None:
    tools = fresh_venv(tmp_path / "venv", dependencies_from_here=True)
    finish([tools / "python", "-m", "pip", "install", built.sdist], tmp_path)
    require_runs(tools, tmp_path)
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    chosen = ["tests/test_layout.py", "tests/test_public_api.py", "tests/test_parity.py"]
    words = [tools / "python", "-m", "pytest", "-q", *chosen]
    said = finish(words, tmp_path / f"mcore_lab-{VERSION}")
    assert " passed" in said and "failed" not in said


USER = """
from mcore_lab import ParallelLayout, Recipe, find_recipe, launch

recipe: Recipe = find_recipe("tp2_gpt")
layout: ParallelLayout = recipe.layout
size: str = layout.tp
summary = launch("tp2_gpt", nproc="2")
"""


def test_a_type_checker_sees_its_types(built: Built, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason='needs mypy: pip install -e ".[dev]"')
    tools = fresh_venv(tmp_path / "venv", dependencies_from_here=False)
    finish([tools / "python", "-m", "pip", "install", "--no-deps", built.wheel], tmp_path)
    (tmp_path / "user.py").write_text(USER)
    words = [sys.executable, "-m", "mypy", "--python-executable", tools / "python", "user.py"]
    done = subprocess.run(
        [*words, "--follow-imports=silent"], cwd=tmp_path, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.partition(":")[2].partition(":")[0] for line in found] == ["6", "7"], done.stdout
