"""Multi-token prediction: beside the next token, the one after it.

Why: a further layer that predicts one token further gives each position a second thing to learn
from.

What to look at: the loss that is reported is the next token's; the further one adds a tenth of its
own to the gradients (`--model.transformer.mtp-loss-scaling-factor`).
Source: DeepSeek-AI, arXiv:2412.19437.
"""

from __future__ import annotations

from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes._small import DATA, TRAINING, small_gpt

RECIPE = Recipe(
    name="mtp_gpt",
    layout=ParallelLayout(
        tensor_model_parallel_size=2,
    ),
    model=small_gpt(transformer={"mtp_num_layers": 1}),
    data=DATA,
    training=TRAINING,
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
