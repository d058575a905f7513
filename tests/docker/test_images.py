"""Both images, built with buildah and run as a user would. Run by docker/test.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_builds import ROOT, Buildah, nvidia_files, python_files

ABSENT = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
HAS_PYTHON = (
    shutil.which("python3.12") is not None
    and subprocess.run(["python3.12", "-c", ""], capture_output=True).returncode == 0
)
pytestmark = [
    pytest.mark.images,
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and chroot need root"),
    pytest.mark.skipif(not HAS_PYTHON, reason="no python3.12 that runs"),
]
NGC_TORCH = "2.9.0a0+1f2e3d.nv26.06"
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    buildah = Buildah(tmp_path_factory.mktemp("buildah"))
    yield buildah
    buildah.remove()


@pytest.fixture(scope="module")
def python_base(buildah: Buildah) -> str:
    files = python_files(buildah.folder / "python", "python3.12")
    return buildah.base("python", files, {"PATH": PATH})


def nvidia_base(buildah: Buildah, python_base: str, torch: str) -> str:
    """Return the name of an image with the metadata of an NGC image, torch of this version."""
    name = f"nvidia-{torch.split('+')[0]}"
    files = nvidia_files(buildah.folder / name, torch)
    container = buildah.run("from", "--pull-never", python_base).stdout.strip()
    buildah.run("copy", "--quiet", container, str(files), "/")
    buildah.run("config", "--env", "PIP_CONSTRAINT=/etc/pip/constraint.txt", container)
    buildah.run("commit", "--quiet", "--rm", container, f"localhost/{name}")
    return f"localhost/{name}"


@pytest.fixture(scope="module")
def ngc_base(buildah: Buildah, python_base: str) -> str:
    return nvidia_base(buildah, python_base, NGC_TORCH)


def test_the_gpu_image_keeps_nvidias_torch_and_transformer_engine(
    buildah: Buildah, ngc_base: str
) -> None:
    built = buildah.build("Dockerfile", "gpu", f"--build-arg=BASE_IMAGE={ngc_base}")
    assert built.returncode == 0, built.stderr[-3000:]
    asked = (
        "import os; from importlib.metadata import version as v; "
        "print(v('torch'), v('transformer-engine'), v('numpy'), v('rich'), os.getuid(), "
        "os.environ['PIP_CONSTRAINT'])"
    )
    ran = buildah.start("gpu", "python", "-c", asked)
    torch, engine, numpy, rich, user, constraint = ran.stdout.split()
    assert (torch, engine, numpy) == (NGC_TORCH, "2.9.0+stub", "2.3.0")
    assert rich != "13.7.0"  # the base's PIP_CONSTRAINT did not hold for our install,
    assert constraint == "/etc/pip/constraint.txt"  # and is still set in the image
    assert user == "10001"
    torchrun = buildah.start("gpu", "torchrun", "--nnodes", "1")
    assert torchrun.stdout.split() == ["0.1.0", NGC_TORCH, "--nnodes", "1"]


def test_the_gpu_image_is_not_built_where_pip_would_change_torch(
    buildah: Buildah, python_base: str
) -> None:
    old = nvidia_base(buildah, python_base, "2.5.0a0+nv24.09")  # Megatron-Core needs 2.6
    built = buildah.build("Dockerfile", "old", f"--build-arg=BASE_IMAGE={old}")
    assert built.returncode != 0
    assert "torch==2.5.0a0+nv24.09" in built.stdout + built.stderr


def test_the_gpu_image_is_not_built_where_the_lock_file_has_a_torch_of_its_own(
    buildah: Buildah, ngc_base: str, tmp_path: Path
) -> None:
    for name in ("docker", "mcore_lab"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    lock = tmp_path / "docker" / "lock" / "gpu.txt"
    torch = (ROOT / "docker" / "lock" / "torch.txt").read_text().split("\ntorch==")[1]
    lock.write_text(f"{lock.read_text()}torch=={torch}")
    option = f"--build-arg=BASE_IMAGE={ngc_base}"
    built = buildah.build("Dockerfile", "changed", option, context=tmp_path)
    assert built.returncode != 0
    assert f"torch=={NGC_TORCH}" in built.stdout + built.stderr


def test_the_gpu_image_is_not_built_on_a_base_without_transformer_engine(
    buildah: Buildah, python_base: str
) -> None:
    built = buildah.build("Dockerfile", "plain", f"--build-arg=BASE_IMAGE={python_base}")
    assert built.returncode != 0
    assert "is it an NGC PyTorch image?" in built.stdout + built.stderr


def packages(buildah: Buildah, image: str) -> list[str]:
    """Return name and version of what an image has installed, sorted."""
    asked = (
        "from importlib.metadata import distributions as all; "
        "print(*sorted(f'{d.name}=={d.version}' for d in all()), sep='\\n')"
    )
    return buildah.start(image, "python", "-c", asked).stdout.split()


def test_two_builds_of_one_commit_have_the_same_packages(buildah: Buildah, ngc_base: str) -> None:
    lists = []
    for tag in ("first", "second"):
        built = buildah.build("Dockerfile", tag, f"--build-arg=BASE_IMAGE={ngc_base}")
        assert built.returncode == 0, built.stderr[-3000:]
        lists.append(packages(buildah, tag))
    assert "megatron-core==0.19.2" in lists[0]
    assert lists[0] == lists[1]


def test_the_cpu_image_trains_tp2_gpt_on_two_ranks_as_a_user_who_is_not_root(
    buildah: Buildah, python_base: str
) -> None:
    built = buildah.build("Dockerfile.cpu", "cpu", f"--build-arg=BASE_IMAGE={python_base}")
    assert built.returncode == 0, built.stderr[-3000:]
    script = (
        "id -u && mcore-lab run tp2_gpt --nproc 2 --training.steps 5"
        " && wc -l < /runs/tp2_gpt/metrics.jsonl"
    )
    for user in ("10001:10001", "4242:4242"):  # the image's own, and one it has never heard of
        ran = buildah.start("cpu", "sh", "-c", script, user=user)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert ran.stdout.split()[0] == user.split(":")[0]
        assert ran.stdout.split()[-1] == "5"
