"""Every command of every document: read by the real parsers here, run as a reader would when slow.

`pytest -m slow tests/test_documents.py` types the commands of each page one after the other in one
folder, as a reader does from top to bottom. What is not run, or in less time, is listed here by
name.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_commands import Command, commands_in
from page_commands import wrong_with as wrong_with_command
from page_runs import run_script, type_line
from pages import blocks_of

ROOT = Path(__file__).parents[1]
_FOLDERS = ("recipes", "docker")
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in sorted(
        [
            *ROOT.glob("*.md"),
            *(page for folder in _FOLDERS for page in (ROOT / folder).rglob("*.md")),
        ]
    )
    # It says what was, not what can be typed.
    if page.name != "CHANGELOG.md"
}
COMMANDS = [command for name, page in PAGES.items() for command in commands_in(page, name)]


def plain(text: str) -> str:
    """Return a command without its comment, and with single spaces."""
    return " ".join(re.sub(r"\s+#.*", "", text).split())


DISTINCT = list({plain(command.text): command for command in COMMANDS}.values())

HELD_ELSEWHERE = {
    "README.zh-CN.md": "tests/test_translation.py holds its commands to those of README.md",
    "recipes/quick_reference.md": "tests/test_quick_reference.py runs all of it",
}
"""Pages whose commands are run elsewhere."""

NOT_HERE = {
    "pip": "installs what is under test; tests/test_packaging.py installs the wheel, and CI this",
    "python -m venv": "makes the environment of the tests; tests/test_packaging.py makes others",
    "python -m pytest": "is these tests",
    "nox": "is these tests on both Pythons",
    "python -m build": "is run by tests/test_packaging.py",
    "docker": "needs a Docker engine",
    "test.sh": "builds the images; it starts the tests of tests/docker",
    "buildah": "is run by the tests of docker/",
    "git": "needs a repository to clone",
    "sbatch": "needs a Slurm cluster",
    "squeue": "needs a Slurm cluster",
    "scancel": "needs a Slurm cluster",
    "kubectl": "needs a Kubernetes cluster",
    "torchrun --nnodes": "needs other machines; tests/test_many_machines.py makes some",
}
"""Programs, by their first words, whose commands are not run here, and why."""

IN_LESS_TIME = {
    "mcore-lab run sequence_memory --compare": ("--training.steps 3", "an hour"),
    "mcore-lab run recipes/tp2_gpt_batch128.toml": ("--training.steps 2", "minutes"),
    "mcore-lab verify --sweep --world 8": ("--world 2", "a quarter of an hour"),
    "mcore-lab bench soak tp2_gpt --kills 20": ("--kills 2", "twenty minutes"),
    "mcore-lab run tp2_gpt --nproc 2 --training.steps 1000 --checkpoint.save-every 50 "
    "--checkpoint.async --max-restarts 3": ("--training.steps 100", "a minute and more"),
}
"""Commands, by how they begin, that get options after theirs, which win; what they take else."""

ENDS_WITH = {
    "mcore-lab check tp2_gpt --nproc 2 --layout.tp 3": 2,
    "mcore-lab checkpoint diff runs/A runs/B": 1,
}
"""Commands that have something to say against what they are given: the status that says so."""


def test_every_document_is_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "recipes/README.md"} <= PAGES.keys()
    assert len(COMMANDS) >= 80


@pytest.mark.parametrize(
    "command", DISTINCT, ids=lambda command: f"{command.page}:{command.line} {command.text:.50}"
)
def test_the_command_is_one_that_the_programs_know(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert list(wrong_with_command(command)) == []


WRONG = """
```bash
mcore-lab run tp2_gpt --nproc 2 --layout.tq 2   # an option
mcore-lab run tp2_gpt --nproc 3                 # a layout
mcore-lab run tp2_gpt --training.lr much
mcore-lab trian tp2_gpt && mcore-lab verify tp2_gpt --swep
mcore-lab checkpoint show runs/A --deep
mcore-lab checkpoint reshard runs/A B \\
    --layout.tpp 2
mcore-lab run tensor_parallel --nprocs 2
torchrun --nprocs-per-node 2 -m mcore_lab.recipes.tp2_gpt
torchrun --nproc-per-node 2 -m mcore_lab.recipes.tp3_gpt
torchrun --nproc-per-node 2 -m mcore_lab.recipes.tp2_gpt --fresch
mcore-lab recipes | head -3 > list.txt
sbatch --nodes 2 --gpus-per-node 8 recipes/slurm/train.sbatch tp2_gpt --data.global-batch-size 3
```

    mcore-lab bench stepp tp2_gpt

A sentence with `mcore-lab verify NAME --step 3`, `mcore-lab verify NAME`, and `mcore-lab rum`.
"""


def test_a_wrong_command_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(WRONG)
    found = {command.line: list(wrong_with_command(command)) for command in commands_in(page, "")}
    assert [line for line, wrong in found.items() if wrong] == [
        3,
        4,
        5,
        6,
        7,
        8,
        10,
        11,
        12,
        13,
        15,
        18,
        20,
    ]
    of_sentence = [bool(list(wrong_with_command(one))) for one in commands_in(page, "")[-3:]]
    assert of_sentence == [True, False, True]
    assert len(found[6]) == 2
    assert "did you mean --layout.tp" in found[3][0]


def reason_not_to_run(command: Command) -> str | None:
    """Return why a command is not run here; None if it is."""
    for first, *words in command.parts:
        named = [Path(first).name.replace("python3", "python"), *words]
        for program, reason in NOT_HERE.items():
            if named[: len(program.split())] == program.split():
                return reason
    return None


def test_what_is_listed_here_is_in_the_documents() -> None:
    texts = {plain(command.text) for command in COMMANDS}
    assert ENDS_WITH.keys() <= texts
    for start in IN_LESS_TIME:
        assert any(text.startswith(start) for text in texts), start
    assert HELD_ELSEWHERE.keys() <= PAGES.keys()


# As a reader types them.

SESSIONS = {
    name: [command for command in COMMANDS if command.page == name and not command.is_inline]
    for name in PAGES
    if name not in HELD_ELSEWHERE
}
SCRIPT = """
import torch
from megatron.core import parallel_state

torch.distributed.init_process_group("nccl")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
whole = torch.ones(1, device="cuda")
torch.distributed.all_reduce(whole, group=parallel_state.get_tensor_model_parallel_group())
assert whole.item() == 2
"""


PREPARED = (
    # The README's first command, which a reader of any page has typed.
    "mcore-lab run tp2_gpt --nproc 2",
    "mcore-lab run tp2_gpt --training.steps 0 --run-dir runs/start",
    "mcore-lab run tp2_gpt --training.steps 2 --checkpoint.load runs/start --run-dir runs/A",
    "mcore-lab run tp2_gpt --training.steps 2 --checkpoint.load runs/start --run-dir runs/B --tp 1",
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that has what readers are told to bring: runs, a text and a script."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "my_text").mkdir()
    (folder / "my_text" / "one.txt").write_text("All that the ranks hold is one model.\n" * 2000)
    (folder / "my_script.py").write_text(SCRIPT)
    for command in PREPARED:
        made = type_line(command, folder)
        assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, commands in SESSIONS.items() if commands])
def test_the_commands_of_the_page_run_one_after_the_other(page: str, reader: Path) -> None:
    wrong = []
    for command in SESSIONS[page]:
        if reason_not_to_run(command):
            continue
        text = plain(command.text)
        fewer = [options for start, (options, _) in IN_LESS_TIME.items() if text.startswith(start)]
        done = type_line(" ".join([text, *fewer]), reader)
        if done.returncode != ENDS_WITH.get(text, 0) or "Traceback" in done.stderr:
            said = done.stderr.strip().splitlines()[-1:]
            wrong.append(f"{page}:{command.line}: {text}: status {done.returncode}: {said}")
    assert "\n".join(wrong) == ""


@pytest.mark.slow
def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    programs = [block for block in blocks_of(PAGES["README.md"]) if block.is_script]
    assert programs
    for block in programs:
        (says,) = re.findall(r"print\(.*\)  # (.*)", block.code)
        assert run_script(block.code, tmp_path) == f"{says}\n"


# Links.


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_the_page_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, place = target.partition("#")
        file = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert file.exists(), target
        if place and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), target
