"""A Slurm cluster on this machine: a node is a network namespace with a slurmd of its own.

Debian's packages as they are (slurmctld, slurmd, slurm-client, munge). The configuration, the keys
and all that the daemons write are in the test's folder; they run as root, who submits the jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import Nodes, nodes

_DAEMONS = ("munged", "slurmctld", "slurmd")
_CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "srun")
_ADMIN = "/usr/sbin:/sbin"
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost=node-0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/linear
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
KillWait=30
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=node-[0-{last}] CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


class Slurm:
    """A cluster that is up; its commands are given on its first node."""

    def __init__(self, network: Nodes, folder: Path) -> None:
        self._network = network
        self._folder = folder

    def submit(self, *words: str, **environment: str) -> str:
        """Submit a job and return its number."""
        variables = [f"{name}={value}" for name, value in environment.items()]
        return self.run("env", *variables, "sbatch", "--parsable", *words).strip()

    def run(self, *words: str) -> str:
        """Give a command of Slurm's and return what it printed."""
        process = self._network.start(0, "env", f"SLURM_CONF={self._folder}/slurm.conf", *words)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, f"{words}: {err}"
        return out

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job: JobState, Restarts, ExitCode and more."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", number)))

    def wait(self, number: str, until: Callable[[dict[str, str]], bool], seconds: float) -> None:
        """Wait until something holds of a job."""
        end = time.monotonic() + seconds
        while not until(job := self.job(number)):
            assert time.monotonic() < end, (job, self.log(number))
            time.sleep(0.5)

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until all nodes are there, and none has a job."""
        end = time.monotonic() + seconds
        shown: list[str] = []
        while True:
            with contextlib.suppress(AssertionError):
                shown = self.run("sinfo", "--noheader", "--Format=StateLong,Nodes").split()
                if shown == ["idle", str(self._network.count)]:
                    return
            if time.monotonic() > end:
                raise TimeoutError(f"not idle: {shown}")
            time.sleep(0.5)

    def log(self, number: str) -> str:
        """Return what a job of the script's has printed so far."""
        file = self._folder / f"mcore-lab-{number}.log"
        return file.read_text() if file.exists() else ""


@contextlib.contextmanager
def slurm(count: int, folder: Path) -> Iterator[Slurm]:
    """Start a cluster of so many nodes, and end it with all that runs there.

    Jobs start in `folder`, which all nodes have. Skips the test where Slurm is not there.
    """
    path = f"{os.environ['PATH']}:{_ADMIN}"
    missing = [name for name in (*_DAEMONS, *_CLIENTS) if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here: Debian's slurmctld, slurmd, slurm-client, munge"
        )
    configuration = _CONFIGURATION.format(folder=folder, last=count - 1, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(configuration)
    # No group is made, but slurmd will know which version there would be.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    with _munged(folder, path), nodes(count, folder) as network:
        cluster = Slurm(network, folder)
        for name, node in [("slurmctld", 0), *(("slurmd", node) for node in range(count))]:
            (folder / f"spool-node-{node}").mkdir(exist_ok=True)
            program = shutil.which(name, path=path)
            words = f"exec {program} -D -f {folder}/slurm.conf > {folder}/{name}-{node}.out 2>&1"
            network.start(node, "sh", "-c", words)
        try:
            cluster.wait_until_idle(60)
        except TimeoutError:
            said = [file.read_text()[-500:] for file in sorted(folder.glob("slurm*.log"))]
            pytest.skip(f"Slurm does not start here: {said}")
        yield cluster


@contextlib.contextmanager
def _munged(folder: Path, path: str) -> Iterator[None]:
    """Run munged, by which Slurm's daemons know each other, with a key of its own."""
    place = folder / "munge"
    place.mkdir(mode=0o755)
    (place / "key").write_bytes(os.urandom(1024))
    (place / "key").chmod(0o400)
    options = [f"--{name}-file={place / name}" for name in ("key", "pid", "log", "seed")]
    options.append(f"--socket={place / 'socket'}")
    program = shutil.which("munged", path=path)
    assert program is not None
    with (folder / "munged.out").open("w") as out:
        daemon = subprocess.Popen(
            [program, "--foreground", "--force", *options], stdout=out, stderr=out
        )
    try:
        end = time.monotonic() + 20
        while not (place / "socket").exists():
            if daemon.poll() is not None or time.monotonic() > end:
                pytest.skip(f"munged does not start here: {(folder / 'munged.out').read_text()}")
            time.sleep(0.1)
        yield
    finally:
        daemon.terminate()
        daemon.wait(timeout=20)
