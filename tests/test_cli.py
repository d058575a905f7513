"""The `mcore-lab` command, as a person or a program calls it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mcore_lab import cli, lessons
from mcore_lab.cli.arguments import smallest_world, usual_world
from mcore_lab.config import Recipe, recipe_to_toml
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes import describe, find_recipe, load_recipe, recipe_names

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}


def command(*words: str, flags: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *flags, "-m", "mcore_lab", *words]


@pytest.fixture
def lab(tmp_path: Path) -> Any:
    """Run a command in an empty folder of its own."""

    def run(*words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words, flags=flags),
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def imported(completed: subprocess.CompletedProcess[str]) -> set[str]:
    """Return the packages that a process started with `-X importtime` has imported."""
    lines = [line for line in completed.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


# Help, and the price of starting.


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_exits_0(lab: Any, words: list[str]) -> None:
    done = lab(*words)
    assert done.returncode == 0 and not done.stderr
    for name, what in cli.COMMANDS.items():
        assert f"{name} " in done.stdout and what in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(lab: Any, name: str) -> None:
    done = lab(name, "--help")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f"usage: mcore-lab {name}")


def test_a_recipes_help_shows_its_own_values_without_colour_in_a_pipe(lab: Any) -> None:
    done = lab("run", "tp2_gpt", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "--layout.tp INT, --tp INT" in done.stdout
    assert "--nproc INT|None" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["recipes"],
        ["check", "tp2_gpt", "--nproc", "2"],
        ["check", "tp2_gpt", "--tp", "3", "--model.transformer.add-bias-linear", "False"],
        ["run", "tp2_gpt", "--nproc", "2", "--tp", "3"],
        ["verify", "tp2_gpt", "--nproc", "2", "--tp", "3"],
        ["verify", "tp2_gpt", "--model.transformer.hidden-dropout", "0.1"],
        ["compare", "runs/one", "runs/other"],
    ],
)
def test_what_starts_no_training_imports_neither_torch_nor_numpy(
    lab: Any, words: list[str]
) -> None:
    packages = imported(lab(*words, flags=("-X", "importtime")))
    assert "mcore_lab" in packages
    assert not packages & {"torch", "megatron", "numpy"}


@pytest.mark.parametrize("words", [["--help"], ["check", "tp2_gpt", "--nproc", "2", "--tp", "2"]])
def test_help_and_check_take_less_than_half_a_second_of_a_processor(
    lab: Any, words: list[str]
) -> None:
    """Of processor time: on a machine that is busy otherwise the wall clock says nothing."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        lab(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


# Recipes.


def test_recipes_lists_each_and_the_lessons_with_their_ranks_and_one_line(lab: Any) -> None:
    assert {"tp2_gpt", "text_gpt"} <= set(recipe_names())
    listed = json.loads(lab("recipes", "--json").stdout)
    recipes = [found for found in listed if "recipe" in found]
    assert [recipe["recipe"] for recipe in recipes] == recipe_names()
    assert [found["lesson"] for found in listed if "lesson" in found] == list(lessons.LESSONS)
    for recipe in recipes:
        assert recipe["what"] == describe(recipe["recipe"]) != ""
        assert recipe["ranks"] == usual_world(load_recipe(recipe["recipe"]))
    table = lab("recipes").stdout
    assert all(describe(name) in table for name in recipe_names())
    assert all(lessons.describe(name) in table for name in lessons.LESSONS)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_the_name_of_its_module(name: str) -> None:
    assert load_recipe(name).name == name


def test_recipes_lists_the_fields_of_transformer_config(lab: Any) -> None:
    every = json.loads(lab("recipes", "--transformer-fields", "--json").stdout)
    assert {"field": "qk_layernorm", "value": "[True|False]"}.items() <= next(
        field.items() for field in every if field["field"] == "qk_layernorm"
    )
    some = lab("recipes", "--transformer-fields", "window-size").stdout
    assert "window_size" in some and "kv_channels" not in some


# Check.


def test_check_prints_the_sizes_of_a_layout_that_fits(lab: Any) -> None:
    batch = ["--data.global-batch-size", "16", "--data.micro-batch-size", "4"]
    done = lab("check", "tp2_gpt", "--nproc", "4", "--json", *batch)
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["ok"] is True and answer["broken"] == [] and answer["nproc"] == 4
    sizes = {"tp": 2, "cp": 1, "pp": 1, "vpp": 1, "dp": 2, "ep": 1, "etp": 2, "edp": 2}
    assert answer["sizes"] == sizes | {"micro_batches": 2}
    plain = lab("check", "tp2_gpt", "--nproc", "4", *batch)
    assert plain.stdout.startswith("tp2_gpt on 4 ranks: ok\n")
    assert "\ndp             2     replicas of the model\n" in plain.stdout


def test_check_takes_as_few_ranks_as_the_layout_allows(lab: Any) -> None:
    options = ["--pp", "2", "--cp", "2", "--model.num-layers", "4", "--json"]
    assert json.loads(lab("check", "tp2_gpt", *options).stdout)["nproc"] == 8


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ({}, 1),
        ({"tp": 2, "cp": 3, "pp": 4}, 24),
        ({"ep": 4}, 4),
        ({"tp": 2, "ep": 2}, 4),
        ({"tp": 4, "ep": 2, "etp": 1}, 4),
        ({"tp": 2, "ep": 3, "etp": 1}, 6),
        ({"tp": 0}, 1),
    ],
)
def test_the_smallest_world_holds_the_dense_and_the_expert_grid(
    sizes: dict[str, int], ranks: int
) -> None:
    assert smallest_world(ParallelLayout().resized(**sizes)) == ranks


@pytest.mark.parametrize("name", ["check", "run"])
def test_every_broken_rule_is_told_and_nothing_is_started(
    lab: Any, name: str, tmp_path: Path
) -> None:
    done = lab(name, "tp2_gpt", "--nproc", "2", "--layout.tp", "3", "--model.num-layers", "3")
    told = done.stdout if name == "check" else done.stderr.removeprefix("error: ")
    assert done.returncode == 2
    recipe = find_recipe("tp2_gpt").with_layout(tensor_model_parallel_size=3)
    rules = recipe.layout.check(recipe.model, recipe.data, 2)
    assert len(rules) >= 2
    expected = [f"tp2_gpt on 2 ranks: {len(rules)} broken rules", *(f"  {rule}" for rule in rules)]
    assert told.splitlines() == expected
    assert list(tmp_path.iterdir()) == []


def test_check_gives_broken_rules_as_json(lab: Any) -> None:
    done = lab("check", "tp2_gpt", "--nproc", "3", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 2 and answer["ok"] is False
    assert [rule.keys() for rule in answer["broken"]] == [{"rule", "numbers", "fix"}]


def test_a_toml_file_stands_for_the_recipe_it_names(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        'name = "tp2_gpt"\n[layout]\npp = 2\n[model]\nnum_layers = 4\n'
    )
    answer = json.loads(lab("check", "own.toml", "--json").stdout)
    assert (answer["recipe"], answer["nproc"], answer["sizes"]["pp"]) == ("tp2_gpt", 4, 2)


def test_what_a_run_wrote_is_the_recipe_it_ran(tmp_path: Path) -> None:
    recipe = load_recipe("tp2_gpt").with_layout(sequence_parallel=True)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert find_recipe(str(tmp_path / "recipe.toml")) == recipe


# Errors.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek"], "no command chek; did you mean check or checkpoint?"),
        (["train", "tp2_gpt"], "no command train; did you mean run?"),
        (["verify", "--world", "8"], "--world is of a sweep: mcore-lab verify --sweep --world 8"),
        (["xyzzy"], f"no command xyzzy; there is {', '.join(cli.COMMANDS)}"),
        (["check", "tp2_gtp"], "no recipe tp2_gtp; did you mean tp2_gpt"),
        (["check", "no.toml"], "no.toml: No such file or directory"),
        (["check", "--nproc", "2", "tp2_gpt"], "the recipe comes first: mcore-lab check NAME"),
        (["run", "tp2_gpt", "--nprocs", "2"], "unknown option --nprocs; did you mean --nproc"),
        (
            ["run", "tp2_pp2_gpt", "--nnodes=2", "--master_addr", "a", "--training.steps", "9"],
            "--nnodes is torchrun's: mcore-lab run starts the ranks of this machine; on each of "
            "several, type: torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d "
            "--rdzv-endpoint a:29500 -m mcore_lab.recipes.tp2_pp2_gpt --training.steps 9\n",
        ),
        (["run", "tp2_gpt", "--nproc", "two"], "--nproc expects a whole number or None; got two"),
        (["recipes", "--jsn"], "unrecognized arguments: --jsn; see mcore-lab recipes --help"),
    ],
)
def test_what_a_person_got_wrong_is_told_in_one_line(
    lab: Any, words: list[str], message: str
) -> None:
    done = lab(*words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_command_that_needs_a_recipe_shows_its_usage(lab: Any) -> None:
    done = lab("check")
    assert done.returncode == 2
    assert "NAME is one of" in done.stdout


def test_errors_are_json_too_where_json_was_asked_for(lab: Any) -> None:
    done = lab("check", "tp2_gtp", "--json")
    assert done.returncode == 2
    assert f"error: {json.loads(done.stdout)['error']}\n" == done.stderr


def test_an_error_of_ours_is_one_line_with_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken = Recipe(name="tp2_gpt", layout=None)  # type: ignore[arg-type]
    monkeypatch.setattr("mcore_lab.cli.arguments.find_recipe", lambda _: broken)
    assert cli.main(["check", "tp2_gpt"]) == 1
    said = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert said.startswith("error: AttributeError: ") and said.count("\n") == 2
    assert f"this is a bug in mcore_lab; the traceback is in {file}\n" in said
    assert "Traceback (most recent call last)" in file.read_text()


def test_ctrl_c_exits_130_without_a_traceback() -> None:
    words = command("doctor", flags=("-X", "importtime"))
    with subprocess.Popen(
        words,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr
        assert any(" torch." in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    told = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, told) == (130, ["error: interrupted"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    words, pipe = command("recipes", "--transformer-fields"), subprocess.PIPE
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr and process.stderr.read() == ""
    assert process.returncode == 141


# Doctor.


def test_doctor_finds_what_these_tests_run_on(lab: Any) -> None:
    import importlib.metadata

    done = lab("doctor", "--json")
    answer = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert done.returncode == 0 and answer["ok"] is True and not done.stderr
    assert found["Megatron-Core"]["found"] == importlib.metadata.version("megatron-core")
    assert found["torch"]["found"].startswith(importlib.metadata.version("torch"))
    assert found["Gloo"]["state"] == found["psutil"]["state"] == "ok"
    assert found["cores"]["found"] == str(len(os.sched_getaffinity(0)))


def test_doctor_names_what_is_missing_and_the_command_that_adds_it() -> None:
    program = (
        "import sys; sys.modules['psutil'] = sys.modules['megatron'] = None\n"
        "from mcore_lab.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert "psutil missing Megatron-Core's checkpoints, which use it" in lines
    assert "psutil: pip install psutil" in lines
    assert 'Megatron-Core: pip install "megatron-core>=0.16.1,<0.20"' in lines
    assert lines[-1].startswith("This machine cannot train yet: Megatron-Core, psutil must be")
