"""What is off, and what is named first, in snapshots that are written by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from verified_models import RECIPES

from mcore_lab.layout import ParallelLayout
from mcore_lab.verify.compare import Verdict, compare
from mcore_lab.verify.order import forward_place
from mcore_lab.verify.report import LayoutDiffersError, VerificationReport
from mcore_lab.verify.signatures import hints
from mcore_lab.verify.snapshot import Snapshot
from mcore_lab.verify.tolerance import Tolerances

RECIPE = RECIPES["dense"]
ALLOWED = Tolerances.of(RECIPE, 2)
LAST_LAYER = "decoder.layers.1.mlp.linear_fc2.weight"
FIRST_LAYER = "decoder.layers.0.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"
NAMES = (EMBEDDING, FIRST_LAYER, LAST_LAYER)


def snapshot() -> Snapshot:
    """Return a run of two steps of a model of three weights."""
    torch.manual_seed(1)
    weights = {name: torch.randn(4, 4) for name in NAMES}
    gradients = {name: torch.randn(4, 4) for name in NAMES}
    squares = {f"exp_avg_sq.{name}": g.square() for name, g in gradients.items()}
    return Snapshot(
        losses=[[4.0, 4.1], [3.9, 3.8]],
        grad_norms=[1.0, 0.9],
        learning_rates=[1e-2, 1e-2],
        auxiliary_losses={"load_balancing_loss": [0.1, 0.2]},
        activations={"embedding": torch.randn(4, 1, 4), "decoder.layers.0": torch.randn(4, 1, 4)},
        gradients=gradients,
        initial_weights=weights,
        weights={name: weight - 0.01 * gradients[name] for name, weight in weights.items()},
        moments={f"exp_avg.{name}": 0.1 * g for name, g in gradients.items()} | squares,
    )


def off(candidate: Snapshot, reference: Snapshot | None = None) -> list[Verdict]:
    verdicts = compare(reference or snapshot(), candidate, ALLOWED)
    return [verdict for verdict in verdicts if not verdict.passed]


def named(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    return [(verdict.kind, verdict.name) for verdict in verdicts]


def test_a_snapshot_is_as_itself() -> None:
    assert off(snapshot()) == []


def test_each_number_of_a_snapshot_counts() -> None:
    """Everything in it is changed, one at a time, and is found under its own name."""
    found = set()
    for field, names in (
        ("initial_weights", NAMES),
        ("activations", ("embedding", "decoder.layers.0")),
        ("gradients", NAMES),
        ("weights", NAMES),
        ("moments", tuple(snapshot().moments)),
    ):
        for name in names:
            candidate = snapshot()
            getattr(candidate, field)[name][0, 0] += 0.1
            first = off(candidate)[0]
            # What an initial weight has to do with weights is how far they have moved.
            assert name.endswith(first.name)
            found.add(first.kind)
    for field in ("losses", "auxiliary_losses"):
        candidate = snapshot()
        values = getattr(candidate, field)
        (values["load_balancing_loss"] if isinstance(values, dict) else values[1])[1] *= 1.001
        (only,) = off(candidate)
        found.add(only.kind)
    for field in ("grad_norms", "learning_rates"):
        candidate = snapshot()
        getattr(candidate, field)[1] *= 1.001
        (only,) = off(candidate)
        assert only.name == "step 2"
        found.add(only.kind)
    candidate = snapshot()
    candidate.torn["weight " + EMBEDDING] = (0.1, "0, 1")
    (only,) = off(candidate)
    assert found | {only.kind} == {
        *("initial weight", "activation", "loss", "auxiliary loss", "gradient", "grad norm"),
        *("learning rate", "moment exp_avg", "moment exp_avg_sq", "weight", "copies"),
    }


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_off(value: float) -> None:
    candidate = snapshot()
    candidate.gradients[EMBEDDING][1, 2] = value
    candidate.losses[1][0] = value
    assert named(off(candidate)) == [("gradient", EMBEDDING), ("loss", "step 2, micro-batch 1")]


@pytest.mark.parametrize("kind", ["gradients", "weights", "moments", "activations"])
def test_what_is_missing_or_of_another_shape_is_off(kind: str) -> None:
    name = list(getattr(snapshot(), kind))[1]
    missing, reshaped = snapshot(), snapshot()
    del getattr(missing, kind)[name]
    getattr(reshaped, kind)[name] = torch.zeros(2)
    for candidate in (missing, reshaped):
        (only,) = off(candidate)
        assert only.error != only.error, "there is no number for it"
        assert name.endswith(only.name)


def test_copies_that_differ_under_a_name_of_their_own_are_off() -> None:
    candidate = snapshot()
    candidate.torn["gradient of buffer[0]"] = (0.1, "0, 1")
    assert named(off(candidate)) == [("copies", "gradient of buffer[0]")]


def test_losses_of_fewer_micro_batches_are_off() -> None:
    candidate = snapshot()
    candidate.losses[1].pop()
    (only,) = off(candidate)
    assert only.name == "step 2, micro-batch 2"


def test_rounding_is_not_off_and_a_little_more_is() -> None:
    for factor, count in ((0.5, 0), (2.0, 1)):
        candidate = snapshot()
        candidate.gradients[FIRST_LAYER] *= 1 + factor * ALLOWED.gradient
        assert len(off(candidate)) == count


def test_a_negligible_tensor_is_measured_against_all_of_them() -> None:
    reference, candidate = snapshot(), snapshot()
    reference.gradients[EMBEDDING] *= 1e-12
    candidate.gradients[EMBEDDING] *= -1e-12
    assert off(candidate, reference) == []
    candidate.gradients[EMBEDDING] += 1e-2
    assert named(off(candidate, reference)) == [("gradient", EMBEDDING)]


def test_elements_whose_gradient_is_noise_are_left_out_of_the_update() -> None:
    reference = snapshot()
    reference.moments[f"exp_avg_sq.{EMBEDDING}"][0, 0] = 1e-20
    candidate = copy.deepcopy(reference)
    candidate.weights[EMBEDDING][0, 0] += 0.01
    assert off(candidate, reference) == []
    (verdict,) = (
        verdict
        for verdict in compare(reference, candidate, ALLOWED)
        if (verdict.kind, verdict.name) == ("weight", EMBEDDING)
    )
    assert verdict.note.startswith("1 elements left out")
    candidate.weights[EMBEDDING][0, 1] += 0.01
    assert named(off(candidate, reference)) == [("weight", EMBEDDING)]


def test_numbers_come_in_the_order_in_which_a_step_computes_them() -> None:
    candidate = snapshot()
    for tensors in (candidate.activations, candidate.gradients):
        for tensor in tensors.values():
            tensor *= 2
    candidate.losses = [[1.0, 1.0], [1.0, 1.0]]
    candidate.grad_norms = [2.0, 2.0]
    candidate.torn = {
        "gradient of " + EMBEDDING: (0.1, "0, 1"),
        "gradient of " + LAST_LAYER: (0.1, "0, 1"),
        "decoder.layers.0": (0.1, "tensor-parallel"),
    }
    assert named(off(candidate)) == [
        ("activation", "embedding"),
        ("activation", "decoder.layers.0"),
        ("copies", "decoder.layers.0"),
        ("loss", "step 1, micro-batch 1"),
        ("loss", "step 1, micro-batch 2"),
        ("copies", "gradient of " + LAST_LAYER),
        ("gradient", LAST_LAYER),
        ("gradient", FIRST_LAYER),
        ("copies", "gradient of " + EMBEDDING),
        ("gradient", EMBEDDING),
        ("grad norm", "step 1"),
        ("loss", "step 2, micro-batch 1"),
        ("loss", "step 2, micro-batch 2"),
        ("grad norm", "step 2"),
    ]


def test_names_sort_as_a_forward_pass_uses_them() -> None:
    in_order = (
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.1.self_attention.linear_q_down_proj.weight",
        "decoder.layers.1.self_attention.q_layernorm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.experts.experts.0.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.experts.3.linear_fc2.weight",
        "decoder.layers.10.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
        "mtp.layers.0.enorm.weight",
    )
    shuffled = sorted(in_order, key=len)
    assert tuple(sorted(shuffled, key=forward_place)) == in_order


def test_bf16_allows_more_than_fp32_and_later_steps_more_than_the_first() -> None:
    bf16 = Tolerances.of(RECIPES["bf16"], 2)
    for name in ("activation", "loss", "gradient", "moment", "update"):
        assert getattr(ALLOWED, name) < getattr(bf16, name) < 1
    assert Tolerances.of(RECIPE, 1).moment < ALLOWED.moment


def verdict(kind: str, name: str, ratio: float = 1.3) -> Verdict:
    return Verdict(kind=kind, name=name, error=0.5, tolerance=1e-5, ratio=ratio)


def hinted(*verdicts: Verdict, ranks: int = 2, **sizes: Any) -> str:
    recipe = replace(RECIPE, layout=ParallelLayout().resized(**sizes))
    return "\n".join(hints(verdicts, recipe, ranks))


def test_nothing_is_guessed_where_nothing_is_off() -> None:
    right = replace(verdict("gradient", EMBEDDING), error=0.0)
    assert hinted(right, tp=2) == ""


def test_nothing_is_guessed_where_nothing_known_looks_like_it() -> None:
    assert hinted(verdict("activation", "decoder.layers.1.mlp"), tp=2) == ""
    assert hinted(verdict("gradient", LAST_LAYER, 1.01), pp=2, vpp=2) == ""


@pytest.mark.parametrize(
    ("ratio", "sizes", "ranks", "says"),
    [
        (2.0, {"cp": 2}, 2, "cp is 2: a loss function that returns two values"),
        (2.0, {"tp": 2}, 2, "tp is 2: it is summed over ranks once too often"),
        (4.0, {}, 4, "dp is 4: gradients are summed over replicas"),
        (0.5, {"tp": 2}, 2, "exactly 1/2 times the reference's gradient, and tp is 2"),
    ],
)
def test_an_exact_factor_is_told_by_the_size_that_it_is(
    ratio: float, sizes: dict[str, int], ranks: int, says: str
) -> None:
    gradients = [verdict("gradient", name, ratio) for name in (LAST_LAYER, EMBEDDING)]
    assert says in hinted(*gradients, ranks=ranks, **sizes)
    for near in (ratio * 1.01, ratio * 3):
        gradients = [verdict("gradient", name, near) for name in (LAST_LAYER, EMBEDDING)]
        assert "exactly" not in hinted(*gradients, ranks=ranks, **sizes)


def report(*verdicts: Verdict) -> VerificationReport:
    return VerificationReport(
        recipe="tp2_gpt",
        layout={"tp": 2, "sp": True},
        world_size=2,
        precision="fp32",
        steps=2,
        verdicts=verdicts,
        hints=("look at it",),
    )


def test_a_report_says_first_what_was_computed_first() -> None:
    right = replace(verdict("loss", "step 1, micro-batch 1"), error=0.0)
    wrong = report(right, verdict("gradient", LAST_LAYER, 2.0), verdict("weight", EMBEDDING))
    with pytest.raises(LayoutDiffersError) as raised:
        wrong.require()
    assert str(raised.value) == (
        f"tp2_gpt on 2 ranks (tp2 sp) is wrong: first gradient {LAST_LAYER}: off by 5.0e-01, "
        "norm 2 times the reference's; 2 of 3 are off\nlook at it"
    )
    report(right).require()


def test_later_losses_may_be_off_by_what_updates_do_and_the_first_may_not():
    allowed = Tolerances.of(RECIPES["dense"], 2)
    assert allowed.loss_of(0) == allowed.loss
    assert allowed.loss < allowed.loss_of(1) < allowed.update / 10
