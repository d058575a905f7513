"""The same GPT on real text, byte by byte, with a loss on text that it has not seen.

Why: mock data shows that a layout runs; text shows that the model learns. The text is tokenised
once, a token a byte, into Megatron-Core's indexed format, and read back by `GPTDataset`.

Its text is that of the current folder, or what `--data.path FILE_OR_FOLDER` names.

What to look at: the validation loss in nats a byte. Bytes drawn evenly would cost ln 256 = 5.5;
English by its letters' frequencies about 3; below that the model has learnt what follows what.
"""

from __future__ import annotations

from mcore_lab.config import Data, Model, Recipe, Training
from mcore_lab.layout import ParallelLayout

RECIPE = Recipe(
    name="text_gpt",
    layout=ParallelLayout(tensor_model_parallel_size=2),
    model=Model(
        num_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        transformer={"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    data=Data(path=".", sequence_length=128, micro_batch_size=8, global_batch_size=8),
    training=Training(
        steps=200,
        lr=1e-3,
        lr_warmup_steps=20,
        lr_decay_style="cosine",
        min_lr=1e-4,
        eval_every=50,
    ),
)

if __name__ == "__main__":
    from mcore_lab.recipes.start import main

    main(RECIPE)
