"""A model that is none of this project's: what builds it and a forward step are enough."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.backends import Backend
from mcore_lab.config import Data, Model, Recipe, Training
from mcore_lab.data.sequences import Batch
from mcore_lab.layout import ParallelLayout
from mcore_lab.model import Stage, model_vocab_size
from mcore_lab.training.forward import token_loss
from mcore_lab.verify import verify
from mcore_lab.verify.report import LayoutDiffersError

TP2 = ParallelLayout(tensor_model_parallel_size=2)
RECIPE = Recipe(
    name="bigrams",
    model=Model(hidden_size=32, transformer={"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    data=Data(sequence_length=16, micro_batch_size=2, global_batch_size=4),
    training=Training(lr=1e-2),
)


class Bigrams(MegatronModule):
    """The next token from this one: an embedding, a split feed-forward layer, a split output."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(config)
        # What Megatron-Core's schedules ask of every model.
        self.model_type = ModelType.encoder_or_decoder
        size, init = config.hidden_size, config.init_method
        self.embedding = VocabParallelEmbedding(vocab_size, size, init_method=init, config=config)
        layer = partial(ColumnParallelLinear, config=config, init_method=init, gather_output=False)
        self.up = layer(size, 4 * size)
        self.down = RowParallelLinear(
            4 * size,
            size,
            config=config,
            init_method=init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        self.output_layer = layer(size, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the losses `[b, s]`."""
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.relu(self.up(hidden)[0]))[0]
        logits, _ = self.output_layer(hidden)
        losses: torch.Tensor = vocab_parallel_cross_entropy(logits, labels)
        return losses

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what an earlier pipeline stage sends: there is none."""


def bigrams(
    recipe: Recipe, config: TransformerConfig, stage: Stage, backend: Backend, vocab_size: int
) -> Bigrams:
    return Bigrams(config, model_vocab_size(recipe, vocab_size))


def with_half_a_sum(*arguments: Any) -> Bigrams:
    model = bigrams(*arguments)
    if dist.get_world_size() > 1:
        model.up.allreduce_dgrad, model.up.disable_grad_reduce = False, True
    return model


def step(data_iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
    batch = next(data_iterator)
    return model(batch["tokens"], batch["labels"]), partial(token_loss, batch["loss_mask"])


def test_a_model_of_ones_own_is_verified() -> None:
    report = verify(RECIPE, TP2, 2, steps=2, build=bigrams, forward_step=step, timeout=60)
    report.require()
    names = {verdict.name for verdict in report.verdicts if verdict.kind == "gradient"}
    assert names == {
        *("embedding.weight", "up.weight", "up.bias", "down.weight", "down.bias"),
        "output_layer.weight",
    }


def test_an_error_in_it_is_found() -> None:
    report = verify(RECIPE, TP2, 2, steps=2, build=with_half_a_sum, forward_step=step, timeout=60)
    with pytest.raises(LayoutDiffersError, match=r"gradient embedding\.weight"):
        report.require()
    assert report.first is not None and report.first.kind == "gradient"
