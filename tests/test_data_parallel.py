"""Replicas train as one rank does: plain, with the distributed optimizer, overlapped, in bf16."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from one_rank import NORM, OneRank, layout_of
from small_runs import SMALL, changed, grad_norms, losses, run

from mcore_lab.errors import ConfigError

OVERLAP = {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    # Parameters of two layers do not fit in one bucket.
    "bucket_size": 5000,
}
RECIPE = changed(SMALL, training={"steps": 3})

BF16_LOSS, BF16_NORM = 2**-9, 2**-5
"""Relative, of numbers that are rounded to 8 bits, each by up to 2^-8 of itself.

A loss of about 5 is computed in fp32 from logits of about 1, and is a mean over 128 tokens whose
errors do not all go one way: well within 2^-8 / 2. A gradient is rounded once for each of some
eight operations that lead to it: 8 * 2^-8.
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(RECIPE, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["2 ranks:", "2 ranks: zero"])
def test_replicas_accumulate_gradients_as_one_rank_does(
    small: OneRank, tmp_path: Path, layout: str, micro_batch_size: int
) -> None:
    data = {"micro_batch_size": micro_batch_size}
    assert small.agrees_with(small.on(layout, tmp_path, data=data))


@pytest.mark.parametrize(
    "layout", ["2 ranks: zero", "4 ranks: tp2 sp zero", "4 ranks: pp2 vpp2 zero"]
)
@pytest.mark.parametrize("aligned", [False, True])
def test_overlapped_communication_changes_nothing(
    small: OneRank, tmp_path: Path, layout: str, aligned: bool
) -> None:
    ddp = OVERLAP | {"align_param_gather": aligned}
    assert small.agrees_with(small.on(layout, tmp_path, training={"ddp": ddp}))


def test_gradients_are_reduced_in_time_without_the_distributed_optimizer(
    small: OneRank, tmp_path: Path
) -> None:
    ddp = {"overlap_grad_reduce": True, "bucket_size": 5000}
    assert small.agrees_with(small.on("2 ranks:", tmp_path, training={"ddp": ddp}))


@pytest.mark.parametrize("guarded", [True, False])
def test_a_checkpoint_of_an_overlapped_run_can_be_gone_on_from(
    small: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Without the guard, Megatron-Core saves what lies after the first bucket displaced."""
    if not guarded:
        guard = "mcore_lab.checkpoint.state.found_in_buckets"
        monkeypatch.setattr(guard, lambda _: nullcontext())
    training = {"steps": 2, "ddp": OVERLAP}
    recipe = changed(small.recipe, training=training, checkpoint={"save": True})
    run(changed(recipe, layout=layout_of("2 ranks: zero")[1]), 2, tmp_path / "begun")
    resume = str(tmp_path / "begun" / "checkpoints" / "step-00000002")
    goes_on = changed(
        RECIPE,
        training={"resume": resume},
        checkpoint={"save": False},
        layout={"use_distributed_optimizer": True},
    )
    metrics = run(goes_on, 1, tmp_path / "run")
    expected = pytest.approx(losses(small.metrics)[2:], rel=1e-5)
    assert (losses(metrics) == expected) is guarded


@pytest.mark.parametrize(
    ("ddp", "zero", "needs"),
    [
        ({"overlap_param_gather": True, "overlap_grad_reduce": True}, False, "--layout.use-dist"),
        ({"overlap_param_gather": True}, True, "needs --training.ddp.overlap-grad-reduce"),
        ({"use_megatron_fsdp": True}, True, "use-megatron-fsdp True is not for recipes"),
    ],
)
def test_what_cannot_be_overlapped_is_refused_before_anything_starts(
    tmp_path: Path, ddp: dict[str, Any], zero: bool, needs: str
) -> None:
    layout = {"use_distributed_optimizer": zero}
    with pytest.raises(ConfigError, match=needs):
        run(changed(RECIPE, training={"ddp": ddp}, layout=layout), 2, tmp_path / "run")


# bf16, its main weights in fp32.


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    recipe = changed(RECIPE, training={"precision": "bf16", "lr": 1e-2})
    return OneRank(recipe, tmp_path_factory.mktemp("bf16"))


@pytest.mark.parametrize(
    "layout",
    ["2 ranks:", "2 ranks: zero", "2 ranks: tp2", "2 ranks: tp2 sp", "4 ranks: tp2 sp zero"],
)
def test_bf16_trains_on_any_layout_as_on_one_rank_within_its_precision(
    bf16: OneRank, tmp_path: Path, layout: str
) -> None:
    metrics = bf16.on(layout, tmp_path)
    assert bf16.agrees_with(metrics, BF16_LOSS, BF16_NORM)
    if "tp2" not in layout:
        # The same products of the same rounded numbers; only their sum, in fp32, has another order.
        assert grad_norms(metrics)[0] == pytest.approx(grad_norms(bf16.metrics)[0], rel=NORM)
