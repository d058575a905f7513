"""One global batch through Megatron-Core's real schedules, with any loss and any finalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.backends import choose_backend, decoder_block_spec
from mcore_lab.checkpoint.load import load_weights
from mcore_lab.config import Recipe
from mcore_lab.model import gpt_arguments, on_device, pipeline_stages, transformer_config
from mcore_lab.runtime import launch, process_group
from mcore_lab.training.forward import forward_step, mean_loss, token_loss
from mcore_lab.training.optimizer import ddp_config, optimizer_config

VOCABULARY, SEQUENCE, SAMPLES = 128, 16, 8

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]
Finalize = Callable[..., None]


class Result(NamedTuple):
    """What a rank has after one global batch."""

    loss: float
    gradients: dict[str, torch.Tensor]
    """The main gradients, by parameter name, as the optimizer would find them."""


class Bigrams(MegatronModule):
    """A table of logits: without attention, context parallelism asks nothing of a model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.table = torch.nn.Parameter(initial_table())

    def set_input_tensor(self, _: Any) -> None:
        """There is no stage before this one."""

    def forward(
        self, tokens: torch.Tensor, *_: Any, labels: torch.Tensor, **__: Any
    ) -> torch.Tensor:
        logits = self.table[tokens].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def initial_table() -> torch.Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))


def batch(*, even: bool) -> dict[str, torch.Tensor]:
    """Return a global batch; uneven masks keep from all of a sample's tokens down to one."""
    draw = torch.Generator().manual_seed(2)
    text = torch.randint(0, 64, (SAMPLES, SEQUENCE + 1), generator=draw)
    kept = torch.full((SAMPLES,), SEQUENCE) if even else torch.tensor([16, 16, 15, 9, 4, 2, 1, 1])
    positions = torch.arange(SEQUENCE).expand(SAMPLES, -1)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": positions,
        "loss_mask": (positions < kept[:, None]).float(),
    }


def micro_batches(whole: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's samples of the batch, and of each sample its context-parallel part."""
    ranks = parallel_state.get_data_parallel_world_size()
    parts = parallel_state.get_context_parallel_world_size()
    part = parallel_state.get_context_parallel_rank()
    first = parallel_state.get_data_parallel_rank() * SAMPLES // ranks
    for start in range(first, first + SAMPLES // ranks, size):
        samples = {name: value[start : start + size] for name, value in whole.items()}
        yield {
            name: value.chunk(parts, dim=1)[part].contiguous() for name, value in samples.items()
        }


def one_batch(
    recipe: Recipe,
    nproc: int,
    *,
    kind: Callable[..., Any] = GPTModel,
    even: bool = True,
    loss: Loss = token_loss,
    finalize: Finalize = finalize_model_grads,
) -> list[Result]:
    """Return what each of `nproc` ranks has after one global batch."""

    def rank() -> Result:
        with process_group() as world:
            parallel_state.initialize_model_parallel(**recipe.layout.model_parallel_sizes())
            torch.manual_seed(recipe.training.seed)
            tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)
            config = transformer_config(recipe)
            config.finalize_model_grads_func = finalize
            bare = Bigrams(config) if kind is Bigrams else _gpt(recipe, config, world.device.type)
            chunk = DistributedDataParallel(config, ddp_config(recipe), on_device(config, bare))
            optimizer = get_megatron_optimizer(optimizer_config(recipe), [chunk])
            if recipe.checkpoint.load:
                load_weights(Path(recipe.checkpoint.load), [chunk], optimizer)
            reports = _forward_backward(recipe, chunk, batch(even=even), loss)
            gradients = {name: weight.main_grad for name, weight in bare.named_parameters()}
            return Result(_reported(reports), gradients)

    return launch(rank, nproc, timeout=120)


def _forward_backward(
    recipe: Recipe, chunk: torch.nn.Module, whole: dict[str, torch.Tensor], loss: Loss
) -> list[dict[str, torch.Tensor]]:
    def step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        output, ours = forward_step(data_iterator, model)
        return output, ours if loss is token_loss else partial(loss, *ours.args)

    size = recipe.data.micro_batch_size
    reports: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=micro_batches(whole, size),
        model=[chunk],
        num_microbatches=SAMPLES // size // parallel_state.get_data_parallel_world_size(),
        seq_length=SEQUENCE,
        micro_batch_size=size,
        forward_only=False,
    )
    return reports


def _reported(reports: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss a token; of a report that holds the loss alone, its mean."""
    if all(report["lm loss"].numel() == 2 for report in reports):
        return mean_loss(reports)
    return torch.stack([report["lm loss"] for report in reports]).mean().item()


def _gpt(recipe: Recipe, config: TransformerConfig, device: str) -> GPTModel:
    (stage,) = pipeline_stages(recipe.layout)
    return GPTModel(
        config,
        decoder_block_spec(config, choose_backend("torch", device)),
        **gpt_arguments(recipe, VOCABULARY),
        pre_process=stage.is_first,
        post_process=stage.is_last,
    )
