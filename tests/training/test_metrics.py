"""What is measured of a run, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, changed, grad_norms, losses, run

from mcore_lab.errors import NotFiniteError

FIELDS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "step_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "tflops_per_rank",
    "mfu",
    "seconds_by_phase",
}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    training = {"lr_warmup_steps": 2, "lr": 1e-2}
    return run(changed(SMALL, training=training), 2, tmp_path_factory.mktemp("runs") / "run")


def test_each_step_is_a_line_with_the_same_fields(metrics: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(line.keys() >= FIELDS for line in metrics)
    assert all(line.keys() == metrics[0].keys() for line in metrics)


def test_the_first_loss_is_that_of_guessing_among_all_tokens(metrics: list[dict[str, Any]]) -> None:
    assert metrics[0]["loss"] == pytest.approx(4.85, abs=0.1)


def test_the_learning_rate_is_the_one_that_the_step_was_taken_with(
    metrics: list[dict[str, Any]],
) -> None:
    assert [line["lr"] for line in metrics] == pytest.approx([0.0, 0.005, 0.01, 0.01])
    # A step that is taken with a rate of 0 changes nothing: the loss is that of other samples.
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], abs=0.05)


def test_tokens_per_second_are_those_of_the_global_batch(metrics: list[dict[str, Any]]) -> None:
    tokens = SMALL.data.global_batch_size * SMALL.data.sequence_length
    for line in metrics:
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tokens)
        assert 0 < line["step_seconds"] < 60


def test_flops_are_those_of_the_step_shared_among_ranks_and_mfu_is_of_a_peak_that_is_given(
    metrics: list[dict[str, Any]], tmp_path: Path
) -> None:
    # Per token: attention 4 h^2, MLP 8 h^2, pairs of tokens s h, in 4 layers; the output layer.
    h, s, rows = 32, 16, 128
    a_step = 8 * s * 6 * (4 * (12 * h * h + s * h) + h * rows)
    for line in metrics:
        done = line["tflops_per_rank"] * 1e12 * line["step_seconds"] * 2
        assert done == pytest.approx(a_step)
        # Nobody knows the peak of this CPU.
        assert line["mfu"] is None
    # Each half of a tensor-parallel model does half of the work.
    of_peak = changed(SMALL, training={"peak_tflops": 0.5, "steps": 1})
    split = changed(of_peak, layout={"tensor_model_parallel_size": 2})
    (line,) = run(split, 2, tmp_path / "split")
    assert line["tflops_per_rank"] * 1e12 * line["step_seconds"] * 2 == pytest.approx(a_step)
    assert line["mfu"] == pytest.approx(line["tflops_per_rank"] / 0.5)


def test_the_peak_memory_is_that_of_a_process_and_does_not_fall(
    metrics: list[dict[str, Any]],
) -> None:
    peaks = [line["peak_memory_bytes"] for line in metrics]
    assert 50e6 < peaks[0] < 20e9
    assert peaks == sorted(peaks)


def test_the_norm_is_measured_before_clipping_and_without_it(tmp_path: Path) -> None:
    norms = [
        grad_norms(run(changed(SMALL, training={"clip_grad": limit}), 1, tmp_path / str(limit)))
        for limit in (0.0, 0.01)
    ]
    assert norms[0][0] == pytest.approx(norms[1][0])
    assert norms[0][0] > 0.5


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_loss_that_is_not_a_number_ends_the_run_and_is_recorded(
    tmp_path: Path, nproc: int
) -> None:
    recipe = changed(SMALL, training={"lr": 1e30})
    with pytest.raises(NotFiniteError, match=r"step \d is not taken: the loss is nan; "):
        run(recipe, nproc, tmp_path / "run")
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["loss"] != json.loads(last)["loss"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_rank_keeps_a_log(tmp_path: Path) -> None:
    run(SMALL, 2, tmp_path / "run")
    for rank in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert f"mcore_lab.training.recorder: rank {rank} of 2, process " in log
    assert "DistributedDataParallel" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


# Validation.


def validated(tmp_path: Path, name: str, nproc: int = 1, **data: Any) -> list[dict[str, float]]:
    text = tmp_path / "text"
    text.write_text("".join(f"{number} little lambs\n" for number in range(1500)))
    recipe = changed(
        SMALL,
        model={"vocab_size": None},
        data={"path": str(text), "cache_dir": str(tmp_path / "cache"), **data},
        training={"eval_every": 3, "eval_samples": 5},
    )
    run(recipe, nproc, tmp_path / name)
    lines = (tmp_path / name / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_validation_follows_every_so_many_steps_and_the_last(tmp_path: Path) -> None:
    lines = validated(tmp_path, "run")
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[1]["valid_loss"] < lines[0]["valid_loss"] < 5.5


def test_the_validation_loss_is_of_the_same_samples_however_ranks_share_them(
    tmp_path: Path,
) -> None:
    one = validated(tmp_path, "one")
    for name, nproc, data in [("two", 2, {}), ("micro", 1, {"micro_batch_size": 4})]:
        for line, expected in zip(validated(tmp_path, name, nproc, **data), one, strict=True):
            assert line["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)


def test_validation_changes_nothing_of_training(tmp_path: Path) -> None:
    validated(tmp_path, "run")
    recipe = changed(
        SMALL,
        model={"vocab_size": None},
        data={
            "path": str(tmp_path / "text"),
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    apart = run(recipe, 1, tmp_path / "apart")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert losses([json.loads(line) for line in lines]) == losses(apart)
