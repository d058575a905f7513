"""A transformer that learns 100 random sequences by heart: what tensor parallelism saves in memory.

Why: the task has no noise, so its loss comes down to nothing within 500 steps, and any error of a
layout would show in the curve. The model is as large as its activations and its vocabulary: each
rank more holds less of all of them but the positions, the norms and the residual stream.

What to look at: `mcore-lab run sequence_memory --compare` trains it on 1, 2 and 4 ranks, on
Megatron-Core and on this project's transformer from scratch, from the same weights: parameters and
peak bytes of tensors a rank, and how far the curves are apart.
"""

from __future__ import annotations

from mcore_lab.config import Data, Model, Recipe, Training

COMPARES = True

RECIPE = Recipe(
    name="sequence_memory",
    model=Model(
        num_layers=8,
        hidden_size=512,
        num_attention_heads=8,
        ffn_hidden_size=1024,
        vocab_size=1024,
        max_sequence_length=1024,
        causal_attention=False,
        # With weights of 0.02, Megatron-Core's own value, the loss ends three times as high.
        transformer={"hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.04},
    ),
    data=Data(
        sequence_length=32,
        micro_batch_size=16,
        global_batch_size=16,
        mock_vocab_size=1023,
        memory_sequences=100,
    ),
    training=Training(steps=500, lr=3e-4),
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
