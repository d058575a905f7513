"""What Megatron-Core does not report: each trap is sprung here, and shown not to be ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import VOCABULARY, Bigrams, Result, batch, initial_table, one_batch
from megatron.core.distributed import finalize_model_grads
from small_runs import SMALL, changed, run

from mcore_lab.checkpoint import step_folder
from mcore_lab.config import Recipe
from mcore_lab.training.forward import token_loss

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}


def small(*, per_token: bool = True, **parts: dict[str, Any]) -> Recipe:
    transformer = SMALL.model.transformer | {"calculate_per_token_loss": per_token}
    return changed(changed(SMALL, model={"transformer": transformer}), **parts)


def require_same_gradients(one: Result, other: Result, rel: float = 1e-4) -> None:
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        off = (gradient - other.gradients[name]).norm() / gradient.norm().clamp(min=1e-6)
        assert off < rel, name


# The loss function: three values, and a report of its own.


def two_values(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What a data-parallel program would return: the mean loss, and the same to report."""
    mean = (losses * loss_mask).sum() / loss_mask.sum()
    return mean, {"lm loss": mean.detach().clone()}


def shared_report(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What looks right: three values, the report detached but not copied."""
    loss_sum = (losses * loss_mask).sum()
    return loss_sum, loss_mask.sum().to(torch.int), {"lm loss": loss_sum.detach()}


def bigram_loss_and_gradient() -> tuple[float, torch.Tensor]:
    """Return those of the whole batch by plain autograd."""
    table = initial_table().requires_grad_()
    whole = batch(even=True)
    logits = table[whole["tokens"]].transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(logits, whole["labels"])
    loss.backward()
    assert table.grad is not None
    return loss.item(), table.grad


@pytest.mark.parametrize("per_token", [True, False])
def test_under_context_parallelism_the_gradient_is_that_of_the_whole_batch(per_token: bool) -> None:
    loss, gradient = bigram_loss_and_gradient()
    for result in one_batch(small(per_token=per_token, layout=CP2), 2, kind=Bigrams):
        assert result.loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(result.gradients["table"], gradient)


def test_a_loss_function_of_two_values_doubles_it() -> None:
    _, gradient = bigram_loss_and_gradient()
    recipe = small(per_token=False, layout=CP2)
    for result in one_batch(recipe, 2, kind=Bigrams, loss=two_values):
        torch.testing.assert_close(result.gradients["table"], 2 * gradient)


def test_the_reported_loss_is_the_mean_a_token_however_the_gradient_is_averaged() -> None:
    loss, _ = bigram_loss_and_gradient()
    for per_token in (True, False):
        (result,) = one_batch(small(per_token=per_token), 1, kind=Bigrams)
        assert result.loss == pytest.approx(loss, rel=1e-6)


def test_a_report_that_shares_its_storage_with_the_loss_is_divided_with_it() -> None:
    loss, _ = bigram_loss_and_gradient()
    recipe = small(per_token=False)
    (result,) = one_batch(recipe, 1, kind=Bigrams, loss=shared_report)
    micro_batches = 8 // recipe.data.micro_batch_size
    assert result.loss == pytest.approx(loss / micro_batches, rel=1e-6)


def test_the_report_of_the_loss_function_has_storage_of_its_own() -> None:
    mask, losses = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    loss_sum, num_tokens, report = token_loss(mask, losses)
    loss_sum /= 100
    num_tokens *= 0
    assert report["lm loss"].tolist() == [3.0, 2.0]


# Uneven masks: every token weighs the same.


def test_uneven_masks_give_the_same_gradients_however_samples_are_spread() -> None:
    (one,) = one_batch(small(), 1, even=False)
    for size in (1, 8):
        (other,) = one_batch(small(data={"micro_batch_size": size}), 1, even=False)
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        require_same_gradients(one, other)
    for other in one_batch(small(), 2, even=False):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        require_same_gradients(one, other)


def test_without_the_loss_per_token_they_depend_on_how_samples_are_spread() -> None:
    (one,) = one_batch(small(per_token=False), 1, even=False)
    (other,) = one_batch(small(per_token=False, data={"micro_batch_size": 8}), 1, even=False)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    with pytest.raises(AssertionError):
        require_same_gradients(one, other, rel=0.05)


# Gradients that are partial until they are finalised.


def only_data_parallel(model: list[Any], *_: Any, **__: Any) -> None:
    """What a data-parallel program would do: reduce over its replicas."""
    for chunk in model:
        chunk.finish_grad_sync()


NORMS = "decoder.layers.0.input_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def one() -> Result:
    """One rank's result, its gradients averaged over micro-batches and not over tokens."""
    (result,) = one_batch(small(per_token=False), 1)
    return result


def test_norms_under_sequence_parallelism_have_that_of_the_whole_sequence(one: Result) -> None:
    recipe = small(per_token=False, layout=TP2 | {"sequence_parallel": True})
    norms = [name for name in one.gradients if "layernorm" in name]
    assert len(norms) == 2 * (2 * SMALL.model.num_layers + 1)
    for result in one_batch(recipe, 2):
        for name in norms:
            torch.testing.assert_close(result.gradients[name], one.gradients[name])


def test_norms_are_left_with_that_of_a_part_without_finalisation(one: Result) -> None:
    recipe = small(per_token=False, layout=TP2 | {"sequence_parallel": True})
    parts = [part.gradients[NORMS] for part in one_batch(recipe, 2, finalize=only_data_parallel)]
    torch.testing.assert_close(sum(parts), one.gradients[NORMS])
    assert (parts[0] - one.gradients[NORMS]).norm() > 0.1 * one.gradients[NORMS].norm()


@pytest.mark.parametrize("finalize", [finalize_model_grads, only_data_parallel])
def test_tied_embeddings_of_two_stages_are_summed_by_finalisation_alone(
    tmp_path: Path, finalize: Any
) -> None:
    tied = small(per_token=False, model={"share_embeddings_and_output_weights": True})
    run(changed(tied, training={"steps": 0}), 1, tmp_path / "initial")
    initial = step_folder(tmp_path / "initial" / "checkpoints", 0)
    tied = changed(tied, checkpoint={"load": str(initial)})
    (alone,) = one_batch(tied, 1)
    first, last = one_batch(changed(tied, layout=PP2), 2, finalize=finalize)
    parts = [first.gradients[EMBEDDING], last.gradients["output_layer.weight"]]
    whole = alone.gradients[EMBEDDING]
    assert whole.shape == (VOCABULARY, SMALL.model.hidden_size)
    if finalize is finalize_model_grads:
        torch.testing.assert_close(parts, [whole, whole])
    else:
        torch.testing.assert_close(sum(parts), whole)
        assert all((part - whole).norm() > 0.3 * whole.norm() for part in parts)
