"""Numbers of a recipe that no run can have. No torch in here: they are found before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mcore_lab.config import Data, Recipe, Training
from mcore_lab.errors import ConfigError

_AT_LEAST = {
    "training.steps": 0,
    "training.seed": 0,
    "training.lr": 0,
    "training.min_lr": 0,
    "training.lr_warmup_steps": 0,
    "training.lr_decay_steps": 1,
    "training.weight_decay": 0,
    "training.adam_beta1": 0,
    "training.adam_beta2": 0,
    "training.adam_eps": 0,
    "training.clip_grad": 0,
    "training.eval_every": 1,
    "training.collective_timeout": 1,
    "training.eval_samples": 1,
    "checkpoint.save_every": 1,
    "checkpoint.keep": 1,
    "data.num_samples": 1,
    "data.mock_vocab_size": 1,
    "data.mock_document_length": 1,
    "data.memory_sequences": 1,
}

TRACE_WARM_UP = 2
"""Steps before the first that `--trace` looks at: in the first much is made that stays, in the
second the memory of activations is counted."""

_NOT_TOLD = {
    ("ddp", "use_megatron_fsdp"): False,
    ("ddp", "use_custom_fsdp"): False,
    ("ddp", "num_distributed_optimizer_instances"): 1,
    ("optimizer", "overlap_param_gather_with_optimizer_step"): False,
    ("optimizer", "use_layer_wise_distributed_optimizer"): False,
}
"""What needs other wrappers, process groups or optimizers than a recipe builds; its defaults."""


def require_trainable(recipe: Recipe) -> None:
    """Raise ConfigError with every number of the recipe that no run can have, one a line."""
    broken = [
        *_too_small(recipe),
        *_schedule(recipe.training),
        *_peak(recipe.training),
        *_split(recipe.data.split),
        *_one_source(recipe.data),
        *_gradient_buffers(recipe),
    ]
    if broken:
        raise ConfigError("\n".join(broken))


def require_traceable(steps: int, first_step: int = 0) -> None:
    """Raise ConfigError if a run that begins after `first_step` has no step left for `--trace`."""
    if steps <= first_step + TRACE_WARM_UP:
        after = f" after step {first_step}" if first_step else ""
        raise ConfigError(
            f"--trace looks at the steps that follow {TRACE_WARM_UP} of warm-up, and with "
            f"--training.steps {steps} there is none{after}: --training.steps "
            f"{first_step + TRACE_WARM_UP + 1} or more"
        )


def decay_steps(training: Training) -> int:
    """Return the step at which the learning rate's decay ends."""
    return training.lr_decay_steps or max(training.steps, training.lr_warmup_steps + 1)


def _too_small(recipe: Recipe) -> Iterator[str]:
    for name, least in _AT_LEAST.items():
        part, _, field = name.partition(".")
        value = getattr(getattr(recipe, part), field)
        if value is not None and not value >= least:
            yield f"--{_dashed(name)} must not be below {least}; it is {value}"


def _schedule(training: Training) -> Iterator[str]:
    if training.min_lr > training.lr:
        yield f"--training.min-lr {training.min_lr} is above --training.lr {training.lr}"
    if training.lr_decay_steps and training.lr_warmup_steps >= training.lr_decay_steps:
        yield (
            f"--training.lr-warmup-steps {training.lr_warmup_steps} must be below "
            f"--training.lr-decay-steps {training.lr_decay_steps}"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(training, name) >= 1:
            yield f"--training.{_dashed(name)} must be below 1; it is {getattr(training, name)}"


def _peak(training: Training) -> Iterator[str]:
    peak = training.peak_tflops
    if peak is not None and not peak > 0:
        yield f"--training.peak-tflops must be above 0; it is {peak}"


def _split(split: str) -> Iterator[str]:
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    match = re.fullmatch(rf"{number}(?:,{number})?(?:,{number})?", split)
    if not match or float(match[1]) == 0:
        yield (
            f"--data.split {split} is not the shares of training, validation and test, of which "
            "the first is above 0: 95,5,0"
        )


def _one_source(data: Data) -> Iterator[str]:
    if data.path is not None and data.memory_sequences is not None:
        yield (
            f"--data.memory-sequences {data.memory_sequences} are not of the text --data.path "
            f"{data.path}: leave one of them out"
        )


def _gradient_buffers(recipe: Recipe) -> Iterator[str]:
    """Hold what Megatron-LM's `validate_args` does, and what the story of a run does not tell."""
    ddp = recipe.training.ddp
    if ddp.get("overlap_param_gather"):
        gather = "--training.ddp.overlap-param-gather gathers what the distributed optimizer splits"
        if not recipe.layout.use_distributed_optimizer:
            yield f"{gather}: it needs --layout.use-distributed-optimizer"
        if not ddp.get("overlap_grad_reduce"):
            yield f"{gather}: it needs --training.ddp.overlap-grad-reduce"
    for (table, name), default in _NOT_TOLD.items():
        value = getattr(recipe.training, table).get(name, default)
        if value != default:
            yield f"--training.{table}.{_dashed(name)} {value} is not for recipes: leave it out"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
