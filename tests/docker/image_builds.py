"""Images built with buildah, which needs no engine, on bases that are made here."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What lets pip of a build reach its index where this machine's own needs it.
OF_THIS_MACHINE = [path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]


@dataclass(frozen=True)
class Buildah:
    """buildah with images of its own under one folder."""

    folder: Path

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one buildah command."""
        storage = ["--root", str(self.folder / "images"), "--runroot", str(self.folder / "run")]
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        ran = subprocess.run(
            ["buildah", *storage, "--storage-driver", "overlay", *arguments],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
        )
        if check and ran.returncode:
            raise AssertionError(
                f"buildah {' '.join(arguments)}:\n{ran.stdout}{ran.stderr}"[-4000:]
            )
        return ran

    def base(self, name: str, files: Path, environment: dict[str, str]) -> str:
        """Make an image of a folder."""
        container = self.run("from", "scratch").stdout.strip()
        self.run("copy", "--quiet", container, str(files), "/")
        for variable, value in environment.items():
            self.run("config", "--env", f"{variable}={value}", container)
        self.run("commit", "--quiet", "--rm", container, f"localhost/{name}")
        return f"localhost/{name}"

    def build(
        self, dockerfile: str, tag: str, *options: str, context: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Build a Dockerfile of docker/ anew, but for pip's cache."""
        volumes = [f"--volume={path}:{path}:ro" for path in OF_THIS_MACHINE]
        return self.run(
            *("bud", "--isolation", "chroot", "--pull-never", "--no-cache", "--tag", tag),
            *("--file", str(context / "docker" / dockerfile), *volumes, *options, str(context)),
            check=False,
        )

    def start(self, image: str, *command: str, user: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in a new container of an image, as `docker run IMAGE COMMAND` does."""
        container = self.run("from", "--pull-never", f"localhost/{image}").stdout.strip()
        about = json.loads(self.run("inspect", container).stdout)
        entrypoint = about["OCIv1"]["config"]["Entrypoint"]
        user = user or about["OCIv1"]["config"]["User"]
        isolation = ("run", "--isolation", "chroot", "--user", user, container, "--")
        ran = self.run(*isolation, *entrypoint, *command, check=False)
        self.run("rm", container)
        return ran

    def remove(self) -> None:
        """Remove all images and the folder."""
        self.run("rm", "--all", check=False)
        self.run("rmi", "--all", "--force", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def python_files(folder: Path, python: str) -> Path:
    """Make a Debian of this machine's release, with this machine's Python in /usr/local."""
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )["VERSION_CODENAME"]
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", release, str(folder)],
        check=True,
        capture_output=True,
    )
    asked = "import sys; print(sys.base_prefix)"
    prefix = Path(subprocess.check_output([python, "-c", asked], text=True).strip())
    local = folder / "usr" / "local"
    library = local / "lib" / "python3.12"
    site = library / "site-packages"
    shutil.copytree(
        prefix / "lib" / "python3.12",
        library,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            "__pycache__", "test", "tkinter", "_tkinter*", "site-packages"
        ),
    )
    for pip in (prefix / "lib" / "python3.12" / "site-packages").glob("pip*"):
        shutil.copytree(pip, site / pip.name)
    shutil.copy(prefix / "bin" / "python3.12", local / "bin" / "python3.12")
    for name in ("python", "python3"):
        (local / "bin" / name).symlink_to("python3.12")
    binaries = [local / "bin" / "python3.12", *(library / "lib-dynload").glob("*.so")]
    linked = subprocess.run(["ldd", *binaries], check=True, capture_output=True, text=True).stdout
    for line in linked.splitlines():
        _, arrow, found = line.partition("=> /")
        path = Path("/" + found.split(" ")[0])
        if arrow and not (folder / path.relative_to("/")).exists():
            shutil.copy(path, local / "lib" / path.name)
    subprocess.run(["chroot", str(folder), "ldconfig"], check=True)
    return folder


def nvidia_files(folder: Path, torch: str) -> Path:
    """Make what an NGC image has on top: names of its builds, and pins that are older than ours."""
    site = folder / "usr" / "local" / "lib" / "python3.12" / "site-packages"
    packages = {"torch": torch, "transformer_engine": "2.9.0+stub", "triton": "3.5.0"}
    for name, version in {**packages, "numpy": "2.3.0", "rich": "13.7.0"}.items():
        about = site / f"{name}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        (about / "RECORD").touch()
        (about / "INSTALLER").write_text("pip\n")
    run = site / "torch" / "distributed" / "run.py"
    run.parent.mkdir(parents=True)
    run.write_text(
        "import sys\nfrom importlib.metadata import version\n"
        "def main():\n    print(version('mcore-lab'), version('torch'), *sys.argv[1:])\n"
    )
    constraint = folder / "etc" / "pip" / "constraint.txt"
    constraint.parent.mkdir(parents=True)
    constraint.write_text("rich==13.7.0\n")
    return folder
