"""Recipes over several machines: a torchrun agent on each, as a cluster starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import Nodes, nodes

from mcore_lab.training import RunFolder

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    *["--model.num-layers", "2", "--model.hidden-size", "32", "--data.sequence-length", "16"],
    *["--data.global-batch-size", "4", "--data.mock-document-length", "64"],
]
ENVIRONMENT = [
    *[f"PYTHONPATH={REPOSITORY}", "OMP_NUM_THREADS=1", "PYTHONWARNINGS=ignore"],
    # It is the names and addresses of the nodes that are to find each other, not the machine's.
    *["-u", "GLOO_SOCKET_IFNAME"],
]


def torchrun(count: int, nproc: int, *options: str) -> list[str]:
    """Return the words of the command that all of so many nodes start."""
    return [
        *["env", *sorted(ENVIRONMENT, key=lambda word: "=" in word)],
        *[sys.executable, "-m", "torch.distributed.run"],
        *["--nnodes", str(count), "--nproc-per-node", str(nproc), *options],
        *["--rdzv-backend", "c10d", "--rdzv-endpoint", "node-0:29500", "--rdzv-id", "a-test"],
    ]


def start(network: Nodes, words: list[str]) -> list[subprocess.Popen[str]]:
    return [network.start(node, *words) for node in range(network.count)]


def finish(agents: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Return how each node's agent ended, what it printed and what it said on standard error."""
    ended = [agent.communicate(timeout=timeout) for agent in agents]
    return [(agent.returncode, *told) for agent, told in zip(agents, ended, strict=True)]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(folder).metrics()]


def one_node(recipe: str, nproc: int, words: list[str], folder: Path) -> list[float]:
    """Return the losses of the same ranks on one machine."""
    lab = [sys.executable, "-m", "mcore_lab", "run", recipe, "--nproc", str(nproc)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([*lab, *words, "--run-dir", "one"], cwd=folder, env=environment, check=True)
    return losses(folder / "one")


def test_two_nodes_have_the_losses_of_one(tmp_path: Path) -> None:
    words = [*SMALL, "--training.steps", "3"]
    with nodes(2, tmp_path) as network:
        ended = finish(start(network, [*torchrun(2, 1), "-m", "mcore_lab.recipes.tp2_gpt", *words]))
    assert [code for code, _, _ in ended] == [0, 0], ended
    # Rank 0 speaks, and every rank has written its log in the folder that they share.
    assert [out.count("step 3/3") for _, out, _ in ended] in ([1, 0], [0, 1])
    folder = tmp_path / "runs" / "tp2_gpt"
    assert {log.name for log in (folder / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    expected = one_node("tp2_gpt", 2, words, tmp_path)
    assert losses(folder) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_four_nodes_of_two_ranks_have_the_losses_of_one(tmp_path: Path) -> None:
    words = ["--training.steps", "6"]
    with nodes(4, tmp_path) as network:
        recipe = [*torchrun(4, 2), "-m", "mcore_lab.recipes.tp2_pp2_dp2_gpt"]
        ended = finish(start(network, [*recipe, *words]))
    assert [code for code, _, _ in ended] == [0] * 4, ended
    folder = tmp_path / "runs" / "tp2_pp2_dp2_gpt"
    assert RunFolder(folder).ranks_that_logged() == 8
    expected = one_node("tp2_pp2_dp2_gpt", 8, words, tmp_path)
    assert losses(folder) == pytest.approx(expected, abs=1e-5)


# A node that is lost.

LONG = [*SMALL, "--training.steps", "1000000", "--checkpoint.save-every", "20"]


def running(folder: Path, agents: list[subprocess.Popen[str]]) -> None:
    """Wait until a run has saved a checkpoint; a launch that ends before fails the test."""
    latest = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    while not latest.exists():
        assert all(agent.poll() is None for agent in agents), finish(agents)
        time.sleep(0.1)


def told(standard_error: str) -> list[str]:
    return [line for line in standard_error.splitlines() if line.startswith("error")]


@pytest.mark.slow
def test_a_node_that_is_cut_off_ends_the_run_with_who_waited_in_what(tmp_path: Path) -> None:
    recipe = [*torchrun(2, 1, "--rdzv-conf", "read_timeout=5"), "-m", "mcore_lab.recipes.tp2_gpt"]
    with nodes(2, tmp_path) as network:
        agents = start(network, [*recipe, *LONG, "--training.collective-timeout", "5"])
        running(tmp_path / "runs" / "tp2_gpt", agents)
        network.cut_off(1)
        ended = finish(agents, timeout=90)
    for node, (code, _, standard_error) in enumerate(ended):
        assert code == 1
        (line,) = told(standard_error)
        assert f" on node-{node} waited 5 s in " in line
        assert "of ranks 0, 1 for a rank" in line and "that did not come" in line


@pytest.mark.slow
def test_a_node_that_is_killed_ends_the_run_with_where_it_was_missed(tmp_path: Path) -> None:
    recipe = [*torchrun(4, 1), "-m", "mcore_lab.recipes.tp2_pp2_gpt"]
    with nodes(4, tmp_path) as network:
        agents = start(network, [*recipe, *LONG])
        running(tmp_path / "runs" / "tp2_pp2_gpt", agents)
        network.kill(3)
        ended = finish(agents, timeout=90)
    assert ended[3][0] == -9
    for node, (code, _, standard_error) in enumerate(ended[:3]):
        assert code == 1
        (line,) = told(standard_error)
        assert f" on node-{node} lost a rank " in line and " of ranks " in line


@pytest.mark.slow
def test_nodes_that_are_left_go_on_from_the_checkpoint_if_they_may(tmp_path: Path) -> None:
    """Two data-parallel nodes, of which one is killed, where one is enough."""
    words = [*SMALL, "--training.steps", "400", "--checkpoint.save-every", "20"]
    recipe = [*torchrun(2, 2, "--max-restarts", "3"), "-m", "mcore_lab.recipes.tp2_gpt", *words]
    recipe[recipe.index("--nnodes") + 1] = "1:2"
    recipe += ["--checkpoint.keep", "2"]
    folder = tmp_path / "runs" / "tp2_gpt"
    with nodes(2, tmp_path) as network:
        agents = start(network, recipe)
        running(folder, agents)
        network.kill(1)
        ended = finish(agents)
    code, _, standard_error = ended[0]
    assert code == 0, standard_error
    metrics = RunFolder(folder).metrics()
    assert [line["step"] for line in metrics] == list(range(1, 401))
    expected = one_node("tp2_gpt", 2, words, tmp_path)
    assert losses(folder) == pytest.approx(expected, abs=1e-4)
