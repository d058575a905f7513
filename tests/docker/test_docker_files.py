"""What docker/ says without an engine: its lock files, its commands, its guard of the base."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
LOCKS = sorted((DOCKER / "lock").glob("*.txt"))
OF_THE_BASE = re.compile(r"torch|triton|numpy|transformer-engine.*|cuda-.*|nvidia-.*")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(path: Path) -> dict[str, tuple[Requirement, list[str]]]:
    """Return, by name, each requirement of a lock file and its hashes."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    requirements = {}
    for entry in re.split(r"\n(?=\S)", "\n".join(lines)):
        text, *hashes = re.split(r"\s*\\\n\s+--hash=", entry.strip())
        requirement = Requirement(text)
        requirements[requirement.name] = requirement, hashes
    return requirements


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_each_requirement_of_a_lock_file_is_pinned_and_hashed(lock: Path) -> None:
    requirements = locked(lock)
    assert requirements
    for requirement, hashes in requirements.values():
        assert re.fullmatch(r"==[0-9][^*,]*", str(requirement.specifier)), requirement
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)


@pytest.mark.parametrize(
    "path", [path for path in DOCKER.rglob("*") if path.is_file()], ids=lambda path: path.name
)
def test_nothing_in_docker_names_a_package_index(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert "://" not in line
        assert not re.search(r"--(extra-)?index-url [^\"]|--find-links", line)


@pytest.mark.parametrize("locks", [("cpu.txt", "torch.txt"), ("gpu.txt",)], ids=["cpu", "gpu"])
def test_a_lock_file_holds_all_that_the_project_asks_for(locks: tuple[str, ...]) -> None:
    have = {name: pin for lock in locks for name, pin in locked(DOCKER / "lock" / lock).items()}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["plot"], *extras["track"]]:
        wanted = Requirement(text)
        if locks == ("gpu.txt",) and OF_THE_BASE.fullmatch(wanted.name):
            continue
        (version,) = have[wanted.name][0].specifier
        assert wanted.specifier.contains(version.version), f"{wanted} is locked to {version}"


def test_what_nvidia_builds_is_left_to_the_base_and_cuda_is_apart_from_the_cpu_lock() -> None:
    assert not [name for name in locked(DOCKER / "lock" / "gpu.txt") if OF_THE_BASE.fullmatch(name)]
    cuda = re.compile(r"torch|cuda-.*|nvidia-.*")
    assert not [name for name in locked(DOCKER / "lock" / "cpu.txt") if cuda.fullmatch(name)]
    assert all(cuda.fullmatch(name) for name in locked(DOCKER / "lock" / "torch.txt"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_there_is_and_starts_a_command_that_there_is(
    dockerfile: Path,
) -> None:
    text = dockerfile.read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--chmod=0755 )?(.*) \S+$", text, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source
    assert 'ENTRYPOINT ["mcore-lab-entrypoint"]' in text
    assert "docker/entrypoint.sh /usr/local/bin/mcore-lab-entrypoint" in text
    assert 'CMD ["mcore-lab", "--help"]' in text
    assert PROJECT["scripts"]["mcore-lab"] == "mcore_lab.cli:main"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_pins_its_base_by_tag_and_runs_as_a_user_who_is_not_root(
    dockerfile: Path,
) -> None:
    text = dockerfile.read_text()
    assert re.search(r"^ARG BASE_IMAGE=[\w./-]+:(?!latest$)[\w.-]+$", text, re.MULTILINE)
    *_, final = re.split(r"^FROM ", text, flags=re.MULTILINE)
    user, group = re.findall(r"^USER (\d+):(\d+)$", final, re.MULTILINE)[-1]
    assert int(user) > 0 and int(group) > 0


def test_the_entrypoint_runs_the_command_under_an_id_without_home_or_name(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "absent")}
    ran = subprocess.run(
        [DOCKER / "entrypoint.sh", "sh", "-c", 'echo "$HOME $USER $1"; exit 3', "sh", "two words"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (ran.returncode, ran.stdout) == (3, "/tmp lab two words\n")


def kept(folder: Path, **versions: str) -> subprocess.CompletedProcess[str]:
    """Run kept.py on a Python that sees only these packages, none of them real."""
    for name, version in versions.items():
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return subprocess.run(
        [sys.executable, "-S", DOCKER / "kept.py"],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_torch_and_transformer_engine_of_the_base_become_constraints(tmp_path: Path) -> None:
    base = {"torch": "2.9.0a0+1f2.nv26.06", "transformer_engine": "2.9+40c", "rich": "13.0"}
    ran = kept(tmp_path, **base)
    assert ran.returncode == 0
    assert ran.stdout == "torch==2.9.0a0+1f2.nv26.06\ntransformer-engine==2.9+40c\n"


def test_a_base_without_transformer_engine_is_refused(tmp_path: Path) -> None:
    ran = kept(tmp_path, torch="2.9.0")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("the base image has no transformer-engine")


def test_the_two_nodes_of_the_compose_file_run_one_command_that_there_is() -> None:
    services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    node0, node1 = services["node0"], services["node1"]
    assert node0["command"] == node1["command"]
    command = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in node0["command"]]
    assert command[0] == "torchrun"
    assert "--nnodes=2" in command
    assert f"--rdzv-endpoint={node0['hostname']}:29500" in command
    assert find_spec(command[command.index("--module") + 1]) is not None
    assert (ROOT / node0["build"]["dockerfile"]).is_file()
