"""The troubleshooting page: the messages on it are those that are said, and its options exist.

A message is provoked, or found in the sources: there, what an f-string fills in is `…`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from mcore_lab import cli
from mcore_lab.cli.run import RunSettings
from mcore_lab.config.options import known_options
from mcore_lab.config.tables import TABLES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "recipes" / "troubleshooting.md"
OURS = ("Before it starts", "Layouts", "Ranks that fail or hang", "Checkpoints")
"""The sections of mcore_lab's own messages."""


def messages(text: str, section: str) -> list[str]:
    """Return the messages in the first column of a section's table."""
    (body,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    cells = [row.split(" | ")[0].removeprefix("| ") for row in re.findall(r"^\| .*", body, re.M)]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


TEXT = PAGE.read_text(encoding="utf-8")
SAID = [message for section in OURS for message in messages(TEXT, section)]

PROVOKED = {
    "unknown option …; did you mean …?": "check tp2_gpt --layout.tpp 2",
    "no recipe or lesson …": "run tp3_gpt",
    "…: No such file or directory": "check no_such.toml",
    "… is torchrun's: mcore-lab run starts the ranks of this machine; …": "run tp2_gpt --nnodes 2",
    "… expects …; got …": "check tp2_gpt --training.lr much",
    "… is not a field of the installed …": "check tp2_gpt --model.transformer.no_such_field 1",
    "there is no checkpoint at …: …": "checkpoint show no_such",
    "world size must be a multiple of tp * cp * pp": "check tp2_pp2_gpt --nproc 6",
    "world size must be a multiple of etp * ep * pp "
    "(ep and etp fold into the world, they do not multiply it)": (
        "check tp2_ep2_moe --layout.etp 2 --nproc 2"
    ),
    "num_attention_heads must be a multiple of tp": "check tp2_gpt --tp 3 --nproc 3",
    "num_layers must be a multiple of pp": "check pp2_gpt --pp 3 --nproc 3",
    "global_batch_size must be a multiple of micro_batch_size * dp": "check dp2_gpt --nproc 3",
    "interleaving needs micro-batches in whole groups": (
        "check pp2_vpp2_gpt --nproc 2 --data.global-batch-size 3"
    ),
    "sequence_parallel needs tp above 1": "check sp2_gpt --tp 1 --nproc 1",
    "experts with tp above 1 need sequence_parallel": "check tp2_ep2_moe --layout.sp False",
    "vocab_size must be a multiple of tp": "check tp2_gpt --model.vocab-size 127",
}
"""Messages that a command provokes which starts nothing."""


def pattern(message: str) -> str:
    """Return what a message must match: `…` stands for anything."""
    return ".*".join(re.escape(part) for part in message.split("…"))


@functools.cache
def templates() -> tuple[str, ...]:
    """Return the texts of the package's sources, with `…` for what is filled in."""
    return tuple(text for file in (ROOT / "mcore_lab").rglob("*.py") for text in _texts(file))


def _texts(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_in_the_sources(message: str) -> bool:
    """Say whether a message is one of the sources, in all of its words."""
    return any(re.search(pattern(message), text, re.DOTALL) for text in templates())


@pytest.mark.parametrize("message", SAID)
def test_the_message_is_one_of_ours(
    message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if message not in PROVOKED:
        assert is_in_the_sources(message)
        return
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert cli.main(PROVOKED[message].split()) == 2
    assert re.search(pattern(message), said.getvalue()), said.getvalue()


def test_a_message_that_nobody_says_is_not_found() -> None:
    assert not is_in_the_sources("the … share of --data.split … holds more than one sample")
    assert not is_in_the_sources("rank … was killed by … (progress …)")


def test_every_message_that_is_provoked_is_on_the_page() -> None:
    assert PROVOKED.keys() <= set(SAID)
    assert len(SAID) >= 35


MEGATRON_CORE = {
    "tensor model parallel group is not initialized": "parallel_state.py",
    "cuda rng state … is not added": "tensor_parallel/random.py",
    "Context parallelism is only supported by TEDotProductAttention": (
        "transformer/dot_product_attention.py"
    ),
    "Cannot use sequence parallelism without tensor parallelism": "model_parallel_config.py",
}
"""Messages of Megatron-Core, and the file that says them in both versions."""


@pytest.mark.parametrize("message", MEGATRON_CORE)
def test_megatron_core_says_so(message: str) -> None:
    assert message in messages(TEXT, "Megatron-Core's own")
    spec = importlib.util.find_spec("megatron")
    assert spec and spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    source = (Path(folder) / "core" / MEGATRON_CORE[message]).read_text(encoding="utf-8")
    assert re.search(pattern(message), source.replace("{}", "…"))


def test_every_option_on_the_page_exists() -> None:
    options = {option.rstrip(".") for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", TEXT)}
    ours = set(known_options(RunSettings)) | {"--naming", "--transformer-fields"}
    ours |= {f"--{name}.{field}" for name, table in TABLES.items() for field in table.known()}
    torchruns = set(get_args_parser()._option_string_actions)
    dockers = {"--shm-size", "--ipc"}
    assert options - ours - torchruns == dockers
