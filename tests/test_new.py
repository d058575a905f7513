"""`mcore-lab new` writes a recipe module that runs at once, and a test that can fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from disks import small_disk

from mcore_lab import cli

LAB = [sys.executable, "-m", "mcore_lab"]


def finish(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=180)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a person's own, in which a module has been written."""
    folder = tmp_path_factory.mktemp("own")
    assert cli.main(["new", "my_net", "--folder", str(folder)]) == 0
    return folder


def test_the_module_trains_at_once_by_the_command_and_by_torchrun(folder: Path) -> None:
    few = ["--training.steps", "2"]
    by_command = finish([*LAB, "run", "./my_net.py", "--nproc", "2", *few], folder)
    assert by_command.returncode == 0, by_command.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    by_torchrun = finish([*torchrun, "my_net.py", *few, "--run-dir", "again"], folder)
    assert by_torchrun.returncode == 0, by_torchrun.stderr
    assert losses(folder / "again") == losses(folder / "runs" / "my_net")
    again = finish([*LAB, "run", "runs/my_net/recipe.toml", *few, "--run-dir", "third"], folder)
    assert again.returncode == 0, again.stderr
    assert losses(folder / "third") == losses(folder / "again")


def test_its_own_test_passes_at_once(folder: Path) -> None:
    tested = finish([sys.executable, "-m", "pytest", "-q", "test_my_net.py"], folder)
    assert tested.returncode == 0 and "1 passed" in tested.stdout


def test_a_forgotten_mark_is_found_in_the_new_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the guide says: the verifier names the parameter, and by how much it is off."""
    assert cli.main(["new", "my_slip", "--folder", str(tmp_path)]) == 0
    module = tmp_path / "my_slip.py"
    text = module.read_text()
    slip = re.sub(r"\n +self\.weight\.sequence_parallel = .*", "", text)
    assert slip != text
    module.write_text(slip)
    capsys.readouterr()
    assert cli.main(["verify", str(module)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "gradient of decoder.layers.3.mlp.scale.weight: off by" in said
    assert "ranks 0, 1 hold different copies" in said
    assert "hint: only weights that several ranks share are off" in said
    assert "under sequence parallelism, the mark parameter.sequence_parallel" in said


def test_a_checkpoint_of_a_model_of_its_own_runs_no_code_that_nobody_has_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come from elsewhere, with the code that it names beside it."""
    assert cli.main(["new", "stranger", "--folder", str(tmp_path)]) == 0
    module, imported = tmp_path / "stranger.py", tmp_path / "imported"
    module.write_text(module.read_text() + f"\nopen({str(imported)!r}, 'w').close()\n")
    trained = finish([*LAB, "run", str(module), "--training.steps", "1"], tmp_path)
    assert trained.returncode == 0 and imported.exists(), trained.stderr
    imported.unlink()
    monkeypatch.chdir(tmp_path)
    run, named = "runs/stranger", ["--module", str(module)]
    sample = ["sample", run, "--tokens", "1,2", "--max-new-tokens", "1"]
    reshard = ["checkpoint", "reshard", run, "other", "--tp", "1", "--sp", "False"]
    for words in (sample, reshard):
        capsys.readouterr()
        assert cli.main(words) == 2
        assert f"if you trust that file, --module {module}" in capsys.readouterr().err
    for words in (["report", run], ["checkpoint", "show", run], ["checkpoint", "export", run, "w"]):
        assert cli.main(words) == 0
    assert not imported.exists()
    for words in (sample, reshard):
        assert cli.main([*words, *named]) == 0
    assert imported.exists()
    assert cli.main(["checkpoint", "show", "other"]) == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("3x", "no name that Python can import"),
        ("my-net", "no name that Python can import"),
        ("class", "no name that Python can import, but a word of its own"),
        ("tp2_gpt", "is a recipe or a lesson of mcore_lab"),
        ("json", "is a module that is installed here"),
        ("torch", "is a module that is installed here"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_a_line(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["new", name, "--folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "my_net.py").read_text()
    assert cli.main(["new", "my_net", "--folder", str(folder)]) == 2
    assert "my_net.py already" in capsys.readouterr().err
    assert (folder / "my_net.py").read_text() == before


def test_a_full_disk_is_told_in_a_line_and_leaves_no_half(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "4k") as disk:
        assert cli.main(["new", "my_net", "--folder", str(disk)]) == 2
        said = capsys.readouterr().err
        assert said == f"error: cannot write {disk}/test_my_net.py: No space left on device\n"
        assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "defines no RECIPE"),
        ("import no_such_module_at_all", "line 1: ModuleNotFoundError"),
        ("x = (", "SyntaxError"),
        (
            "from mcore_lab import Recipe\nRECIPE = Recipe(name='other')",
            "its RECIPE is to be found by its file: name=__file__",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_a_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Modules are known by their names: each file has one of its own.
    file = tmp_path / f"{tmp_path.name}.py"
    file.write_text(text)
    assert cli.main(["check", str(file)]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert cli.main(["run", str(tmp_path / "none.py")]) == 2
    assert "there is no such file" in capsys.readouterr().err
