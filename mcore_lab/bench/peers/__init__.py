"""The model of a recipe trained without Megatron-Core, to measure its steps beside.

Two loops, as their users would write them: `from_scratch` of tensor-parallel layers that call
collectives themselves (in the manner of picotron; they are those of the lessons), `plain_torch` of
torch's own modules, that `parallelize_module` splits (in the manner of torchtitan). Both start from
the weights of Megatron-Core's model and see the same batches, so that their losses must be its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mcore_lab.config import Model, Recipe, Training
from mcore_lab.layout import ParallelLayout

Weights = Mapping[str, Tensor]
"""This rank's parameters of Megatron-Core's `GPTModel`, by name."""
Batch = Mapping[str, Tensor]
"""A micro-batch: `tokens` and `labels`, each `[b, s]`."""

_SHAPE = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size"),
    *("max_sequence_length", "backend"),
)
_ADAM = (
    *("steps", "seed", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
    *("eval_every", "eval_samples", "resume", "collective_timeout", "peak_tflops"),
)
"""What a recipe may choose of its model and of its training."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a loop leaves: when each step had ended, and its loss."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def why_none(recipe: Recipe, nproc: int) -> str | None:
    """Return what the peers do not have of a recipe; None if they compute just what it does."""
    model, training = recipe.model, recipe.training
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    dense = Model(**{name: getattr(model, name) for name in _SHAPE}, transformer=no_dropout)
    adam = Training(**{name: getattr(training, name) for name in _ADAM})
    lacks = {
        "its layout splits more than tensors": recipe.layout
        != ParallelLayout(tensor_model_parallel_size=nproc),
        "its model is more than a dense GPT with learned positions, an output layer of its own and "
        "no dropout": model != dense,
        "it trains with more than Adam in fp32 and clipping": training != adam
        or training.clip_grad <= 0,
        "its documents are packed": recipe.data.pack_documents,
        "its vocabulary is not given": model.vocab_size is None,
    }
    return next((why for why, is_so in lacks.items() if is_so), None)


def train(
    recipe: Recipe,
    micro_batches: Iterator[Batch],
    backward: Callable[[Batch, float], Tensor],
    step: Callable[[], None],
) -> Trained:
    """Take the recipe's steps.

    `backward` adds to the gradients those of a micro-batch's mean loss by a factor, and returns
    that loss; `step` clips the gradients, takes a step with them and lets go of them.
    """
    count = recipe.data.global_batch_size // recipe.data.micro_batch_size
    trained = Trained()
    for _ in range(recipe.training.steps):
        losses = [backward(next(micro_batches), 1 / count) for _ in range(count)]
        step()
        trained.losses.append(torch.stack(losses).mean().item())
        trained.ends.append(time.perf_counter())
    return trained


def adamw(recipe: Recipe, model: torch.nn.Module) -> torch.optim.AdamW:
    """Return the recipe's optimizer, which decays matrices and neither biases nor norms."""
    training, parameters = recipe.training, list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [one for one in parameters if one.dim() > 1]},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=training.lr,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )
