"""The loss on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from mcore_lab.config import Recipe
from mcore_lab.data.batches import validation_batch
from mcore_lab.training.forward import ForwardStep, forward_step, mean_loss


def evaluate(
    recipe: Recipe,
    dataset: Dataset[Any],
    model: list[torch.nn.Module],
    forward_backward: Callable[..., list[dict[str, torch.Tensor]]],
    forward_step: ForwardStep = forward_step,
) -> float:
    """Return the mean loss a token, in nats, of the same `eval_samples` samples each time."""
    batch = validation_batch(recipe, dataset)
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=[batch.after(0) for _ in model],
            model=model,
            num_microbatches=batch.num_microbatches,
            seq_length=recipe.layout.padded(recipe.data.sequence_length),
            micro_batch_size=recipe.data.micro_batch_size,
            forward_only=True,
        )
    for chunk in model:
        chunk.train()
    return mean_loss(reports)
