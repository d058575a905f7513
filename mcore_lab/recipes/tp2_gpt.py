"""A GPT whose weight matrices are split over two ranks: tensor parallelism, the place to start.

Why: a layer's matrices are cut in two, by columns then by rows, so that each half of a layer needs
one all-reduce in the forward pass and one in the backward pass. Each rank holds half the weights
and half the optimizer's state, and computes half of each product.

What to look at: run it on one rank too (`--layout.tp 1`). The losses are the same to 1e-5 at every
step, since the initial weights are drawn whole on every rank and then cut.
"""

from __future__ import annotations

from mcore_lab.config import Data, Model, Recipe, Training
from mcore_lab.layout import ParallelLayout

RECIPE = Recipe(
    name="tp2_gpt",
    layout=ParallelLayout(tensor_model_parallel_size=2),
    model=Model(
        num_layers=10,
        hidden_size=512,
        num_attention_heads=4,
        vocab_size=100,
        transformer={"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    data=Data(sequence_length=64, micro_batch_size=2, global_batch_size=8),
    training=Training(steps=20, lr=3e-4),
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
