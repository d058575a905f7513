"""A GPT whose feed-forward layers have a part of their own: a learned scale of what they add.

Run it:

    mcore-lab run ./my_model.py --nproc 2
    torchrun --nproc-per-node 2 my_model.py

What is yours is `Scale`, `ScaledMLP` and `build`; the rest is Megatron-Core's GPT.
"""

from __future__ import annotations

from typing import Any

from mcore_lab import Data, Model, ParallelLayout, Recipe, Training

# Before Megatron-Core, whose imports it keeps quiet, and without torch.compile on CPU.
from mcore_lab.recipes.own import Backend, Stage, built_as, decoder_block_spec, gpt_chunk

# isort: split
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

RECIPE = Recipe(
    # Its file, by which the commands find what it defines.
    name=__file__,
    layout=ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True),
    model=Model(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        transformer={"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    data=Data(sequence_length=64, micro_batch_size=2, global_batch_size=8),
    training=Training(steps=20, lr=1e-3),
)


class Scale(MegatronModule):
    """A learned factor for each channel (LayerScale: Touvron et al., arXiv:2103.17239)."""

    def __init__(self, config: TransformerConfig, start: float = 0.1) -> None:
        super().__init__(config)
        # A tensor-parallel rank holds all of it. Under sequence parallelism it sees a part of each
        # sequence, and has a part of the gradient: Megatron-Core sums those of marked parameters.
        self.weight = torch.nn.Parameter(torch.full((config.hidden_size,), start))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Take and return `[s, b, h]`; under sequence parallelism `[s / tp, b, h]`."""
        return hidden_states * self.weight


class ScaledMLP(MLP):
    """Megatron-Core's feed-forward layer, with its output scaled."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.scale = Scale(config)

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        """Return the output `[s, b, h]` with its bias, which Megatron-Core leaves to be added."""
        output, bias = super().forward(hidden_states, *arguments, **named)
        return self.scale(output if bias is None else output + bias), None


def build(
    recipe: Recipe, config: TransformerConfig, stage: Stage, backend: Backend, vocab_size: int
) -> torch.nn.Module:
    """Return this rank's part of the model: the commands call this in the place of their GPT."""
    spec = decoder_block_spec(config, backend, stage.vp_stage)
    for layer in spec.layer_specs:
        layer.submodules.mlp = built_as(ScaledMLP, layer.submodules.mlp)
    return gpt_chunk(recipe, config, stage, backend, vocab_size, block_spec=spec)


if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
