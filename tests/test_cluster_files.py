"""What a Kubernetes cluster is given, without one.

The manifests are held against the schemas of Kubernetes and of Kubeflow Trainer where those are
installed, and against the images of docker/.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import Nodes, nodes
from page_commands import Command, wrong_with

from mcore_lab.training import RunFolder

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "recipes" / "kubernetes"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


FILES = sorted(path.name for path in KUBERNETES.glob("*.yaml"))
ALL = [(name, manifest) for name in FILES for manifest in manifests(name)]
SERVICE, JOB = manifests("job.yaml")
RUNTIME, TRAIN_JOB = manifests("trainjob.yaml")
(CLAIM,) = manifests("runs.yaml")
JOB_SPECS = {
    "job.yaml": JOB["spec"],
    "trainjob.yaml": RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"],
}
POD_SPECS = {name: spec["template"]["spec"] for name, spec in JOB_SPECS.items()}
TRAINER = TRAIN_JOB["spec"]["trainer"]


def container(name: str) -> dict[str, Any]:
    (found,) = POD_SPECS[name]["containers"]
    return dict(found)


def environment(name: str) -> dict[str, Any]:
    return {variable["name"]: variable for variable in container(name)["env"]}


ARGUMENTS = {
    "job.yaml": container("job.yaml")["args"],
    # Trainer says the rest in PET_NNODES and PET_NPROC_PER_NODE, of which torchrun makes options.
    "trainjob.yaml": [
        TRAINER["args"][0],
        f"--nnodes={TRAINER['numNodes']}",
        f"--nproc-per-node={TRAINER['numProcPerNode']}",
        *TRAINER["args"][1:],
    ],
}


def option(name: str, of: str) -> str:
    """Return the value of an option of a manifest's command."""
    (value,) = [
        word.removeprefix(f"{of}=") for word in ARGUMENTS[name] if word.startswith(f"{of}=")
    ]
    return value


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_command_of_a_manifest_is_one_that_there_is(name: str) -> None:
    assert list(wrong_with(Command(name, 0, shlex.join(ARGUMENTS[name])))) == []
    assert option(name, "--training.resume") == "auto"


def said_in(dockerfile: str, instruction: str) -> str:
    text = (ROOT / "docker" / dockerfile).read_text()
    return re.findall(rf"^{instruction} (.*)$", text, re.MULTILINE)[-1]


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.cpu"])
@pytest.mark.parametrize("name", POD_SPECS)
def test_a_manifest_runs_the_images_of_docker_as_they_are_made(name: str, dockerfile: str) -> None:
    user, group = map(int, said_in(dockerfile, "USER").split(":"))
    security = POD_SPECS[name]["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (user, group)
    # A volume belongs to root; its group is made one that the user is in.
    assert security["fsGroup"] == group and security["runAsNonRoot"] is True
    # A command would take the place of the entrypoint, arguments do not.
    assert "command" not in container(name)
    entrypoint = yaml.safe_load(said_in(dockerfile, "ENTRYPOINT"))
    assert TRAINER["command"] == entrypoint
    mounts = {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD_SPECS[name]["volumes"]}
    runs = volumes[mounts[said_in(dockerfile, "VOLUME")]]
    assert runs["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert option(name, "--run-dir").startswith(said_in(dockerfile, "VOLUME") + "/")
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_images_are_those_that_docker_readme_builds() -> None:
    text = (ROOT / "docker" / "README.md").read_text()
    built = set(re.findall(r"^docker build .*--tag (\S+)", text, re.MULTILINE))
    named = {container(name)["image"] for name in POD_SPECS} | {TRAINER["image"]}
    assert named == built == {"mcore-lab:cpu", "mcore-lab:gpu"}


def test_the_pods_of_the_job_meet_at_the_first_of_them() -> None:
    assert JOB["spec"]["completionMode"] == "Indexed"
    pods = JOB["spec"]["completions"], JOB["spec"]["parallelism"]
    assert pods == (int(option("job.yaml", "--nnodes")),) * 2
    # A pod of an indexed Job is called JOB-INDEX.SERVICE, if its subdomain is a headless service.
    service = SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"]
    assert POD_SPECS["job.yaml"]["subdomain"] == service
    label = SERVICE["spec"]["selector"]
    assert label == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    host, _, port = option("job.yaml", "--rdzv-endpoint").rpartition(":")
    assert host == f"{JOB['metadata']['name']}-0.{service}.$(NAMESPACE).svc.cluster.local"
    namespace = environment("job.yaml")["NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert namespace == "metadata.namespace"
    assert [port["port"] for port in SERVICE["spec"]["ports"]] == [int(port)]
    assert [port["containerPort"] for port in container("job.yaml")["ports"]] == [int(port)]


@pytest.mark.parametrize("name", POD_SPECS)
def test_ranks_have_the_time_to_save_before_their_pod_is_ended(name: str) -> None:
    seconds = int(environment(name)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"])
    assert 30 < seconds < POD_SPECS[name]["terminationGracePeriodSeconds"]


def test_a_pod_that_the_cluster_ends_is_no_failure_and_the_others_start_again() -> None:
    disruption = [{"type": "DisruptionTarget", "status": "True"}]
    for spec in JOB_SPECS.values():
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
    # torchrun's status is 1 for ranks that have saved and ended with 75, and for any failure.
    job = JOB["spec"]
    assert job["podFailurePolicy"]["rules"] == [{"action": "Ignore", "onPodConditions": disruption}]
    assert job["podReplacementPolicy"] == "Failed"
    assert job["backoffLimitPerIndex"] > 0 and job["maxFailedIndexes"] == 0
    assert JOB_SPECS["trainjob.yaml"]["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onPodConditions": disruption}
    ]
    policy = RUNTIME["spec"]["template"]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_train_job_is_of_the_runtime_beside_it() -> None:
    reference = TRAIN_JOB["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (RUNTIME["kind"], RUNTIME["metadata"]["name"])
    assert RUNTIME["apiVersion"].startswith(reference["apiGroup"] + "/")
    gpus = TRAINER["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == TRAINER["numProcPerNode"]


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """Say which fields of a manifest a model has not taken."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}[{index}]")
    elif given != kept:
        yield f"{place}: {given} became {kept}"


MODELS = {
    "v1": "IoK8sApiCoreV1",
    "batch/v1": "IoK8sApiBatchV1",
    "trainer.kubeflow.org/v1alpha1": "TrainerV1alpha1",
}
"""How Kubeflow Trainer's package, which has Kubernetes' kinds as well, calls those of an API."""


def wrong_fields(manifest: dict[str, Any]) -> list[str]:
    """Return the fields that a manifest's kind does not have; raises for values and what lacks."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="no schemas: pip install kubeflow-trainer-api"
    )
    model = getattr(models, MODELS[manifest["apiVersion"]] + manifest["kind"])
    return list(lost(manifest, model.from_dict(manifest).to_dict()))


@pytest.mark.parametrize(
    "manifest", [one for _, one in ALL], ids=[f"{name}-{one['kind']}" for name, one in ALL]
)
def test_a_manifest_keeps_to_the_schema_of_its_kind(manifest: dict[str, Any]) -> None:
    assert wrong_fields(manifest) == []


@pytest.mark.parametrize("manifest", [JOB, TRAIN_JOB], ids=["Job", "TrainJob"])
def test_the_schemas_refuse_a_field_that_there_is_not(manifest: dict[str, Any]) -> None:
    misspelt = manifest | {"spec": manifest["spec"] | {"paralelism": 2}}
    assert wrong_fields(misspelt) == [".spec.paralelism"]
    with pytest.raises(ValueError, match="int"):
        wrong_fields(JOB | {"spec": JOB["spec"] | {"parallelism": "two"}})


@pytest.mark.parametrize("manifest", [CLAIM, SERVICE, JOB], ids=lambda manifest: manifest["kind"])
def test_a_manifest_keeps_to_the_newest_schema_that_kubernetes_has(
    manifest: dict[str, Any],
) -> None:
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="no newest schemas: pip install kubernetes-validate (108 MB)"
    )
    kubernetes.validate(manifest, kubernetes.latest_version(), strict=True)


# The command of the Job, on machines that are called as its pods are.

SMALL = [
    *["--model.num-layers=2", "--model.hidden-size=32", "--data.sequence-length=16"],
    *["--data.global-batch-size=4", "--data.mock-document-length=64", "--training.steps=200"],
]


def pods(network: Nodes, folder: Path) -> list[subprocess.Popen[str]]:
    """Start the Job's command in each pod, as kubelet does: its name, and its /etc/hosts."""
    names = [f"mcore-lab-{pod}" for pod in range(network.count)]
    full = [f"{name}.mcore-lab.default.svc.cluster.local {name}" for name in names]
    addresses = [f"10.77.0.{pod + 1} {name}" for pod, name in enumerate(full)]
    command = [
        word.replace("$(NAMESPACE)", "default").replace("/runs/", f"{folder}/")
        for word in container("job.yaml")["args"]
    ]
    assert command[0] == "torchrun"
    command[:1] = [sys.executable, "-m", "torch.distributed.run"]
    variables = [f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", "PYTHONWARNINGS=ignore"]
    started = []
    for pod, name in enumerate(names):
        # Its own first; those of the others stand for the cluster's name server.
        own = [addresses[pod], *(line for line in addresses if line != addresses[pod])]
        (folder / f"hosts-{pod}").write_text("\n".join(["127.0.0.1 localhost", *own]) + "\n")
        run = ["sh", "-c", 'hostname "$1"; shift; exec "$@"', "sh", name]
        words = [*run, "env", "-u", "GLOO_SOCKET_IFNAME", *variables, *command, *SMALL]
        started.append(network.start(pod, *words))
    return started


@pytest.mark.slow
def test_the_pods_of_the_job_train_save_when_one_is_ended_and_go_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "mcore-lab")
    with nodes(2, tmp_path) as network:
        agents = pods(network, tmp_path)
        end = time.monotonic() + 120
        while len(run.metrics()) < 20:
            assert time.monotonic() < end and all(agent.poll() is None for agent in agents)
            time.sleep(0.2)
        agents[1].terminate()
        told = [agent.communicate(timeout=60) for agent in agents]
        assert [agent.returncode for agent in agents] == [1, 1], told
        steps = len(run.metrics())
        assert 20 <= steps < 200
        assert (run.checkpoints / f"step-{steps:08}").is_dir()
        agents = pods(network, tmp_path)
        told = [agent.communicate(timeout=120) for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], told
    assert [line["step"] for line in run.metrics()] == list(range(1, 201))
