"""A recipe and its parts: everything that a run is made of, as plain values.

No torch in here: `mcore-lab check` and `mcore-lab --help` read recipes in milliseconds. Names are
Megatron-Core's own. A docstring under a field is its help text on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mcore_lab.layout import ParallelLayout

PositionEmbedding = Literal["learned_absolute", "rope", "none"]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained: a GPT's shape, `GPTModel`'s arguments and any `TransformerConfig` field."""

    num_layers: int = 2
    """Transformer layers."""
    hidden_size: int = 64
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Attention heads."""
    num_query_groups: int | None = None
    """Key/value heads of grouped-query attention; all attention heads if not set."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer; 4 x hidden_size if not set."""
    num_moe_experts: int | None = None
    """Experts of a mixture-of-experts layer; a dense model if not set."""

    vocab_size: int | None = None
    """Rows of the embedding; if not set, what the tokenizer needs, rounded up to fit the layout."""
    max_sequence_length: int | None = None
    """Longest sequence the model takes, in tokens; the data's sequence length if not set."""
    position_embedding_type: PositionEmbedding = "learned_absolute"
    """How positions enter the model."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer's weight to the embedding's."""
    parallel_output: bool = True
    """Keep the logits split over tensor-parallel ranks."""
    fp16_lm_cross_entropy: bool = False
    """Compute the cross-entropy in half precision."""
    rotary_percent: float = 1.0
    """Share of each head's channels that rotary embeddings turn."""
    rotary_base: int = 10000
    """Base of the rotary embeddings' frequencies."""
    rope_scaling: bool = False
    """Scale the rotary embeddings for long sequences, as Llama 3.1 does."""
    rope_scaling_factor: float = 8.0
    """By how much `rope_scaling` stretches them."""
    causal_attention: bool = True
    """A token sees only those before it, else all of its sequence."""
    seq_len_interpolation_factor: float | None = None
    """Interpolate rotary positions by this factor."""
    scatter_embedding_sequence_parallel: bool = True
    """Scatter the embedding's output over tensor-parallel ranks under sequence parallelism."""

    backend: Literal["auto", "torch", "te"] = "auto"
    """What layers are built of: this project's pure PyTorch, or Transformer Engine."""
    transformer: Mapping[str, Any] = field(default_factory=dict)
    """Any other field of the installed Megatron-Core's `TransformerConfig`, by name."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it is trained on. Samples are drawn by global index, the same for every layout."""

    path: str | None = None
    """A UTF-8 text file, or a folder of them, of which hidden files, installed packages and run
    folders are left out; Megatron-Core's mock data if not set."""
    sequence_length: int = 64
    """Tokens in a sample."""
    micro_batch_size: int = 4
    """Samples that one rank takes through the model at a time."""
    global_batch_size: int = 8
    """Samples in an optimizer step, over all data-parallel ranks and micro-batches."""
    num_samples: int = 1000
    """Mock data: how many samples there are."""
    mock_vocab_size: int = 64
    """Mock data: the tokens are 0 to this number."""
    mock_document_length: int | None = None
    """Mock data: documents have 1 to this many tokens; Megatron-Core's 4,095 if not set."""
    memory_sequences: int | None = None
    """Sequence memory in the place of mock documents: so many random sequences of mock tokens, each
    of which is its own label."""
    pack_documents: bool = False
    """Keep the documents of a sample apart: no attention from one to another, positions from 0
    (packed sequences in `thd` format). Else a token sees all that come before it in its sample."""
    split: str = "95,5,0"
    """Text: shares of training, validation and test, by document."""
    cache_dir: str = "runs/cache"
    """Text: where the tokenised text is kept, once for all runs."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is trained: steps, Adam and its schedule."""

    steps: int = 20
    """Optimizer steps in all; with 0 the initial weights are written as a checkpoint."""
    seed: int = 1234
    """Seed of the initial weights, of dropout and of the order of the data."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    min_lr: float = 0.0
    """Learning rate that the decay ends at."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_decay_style: DecayStyle = "constant"
    """How the learning rate falls after warm-up."""
    lr_decay_steps: int | None = None
    """Step at which the decay ends; the last step if not set."""
    weight_decay: float = 0.0
    """Adam's decoupled weight decay."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's term that keeps the denominator from zero."""
    clip_grad: float = 1.0
    """Norm to which gradients are clipped; 0 does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model; bf16 keeps fp32 main weights in the optimizer."""
    eval_every: int | None = None
    """Steps between validations, where the data has a validation split; at the end if not set."""
    eval_samples: int = 64
    """Samples of a validation."""
    resume: str = "none"
    """Go on from a checkpoint, its optimizer and step: none, auto (the folder's last) or a path."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What a loss or a gradient that is not finite does: stop the run before the step that it would
    spoil, or skip that step and go on."""

    collective_timeout: float = 600.0
    """Seconds that a rank waits for others in one collective: longer, and the run ends with the
    rank and the operation that waited. More than the slowest checkpoint takes to write."""

    peak_tflops: float | None = None
    """TFLOP/s that a rank's device can do at most, of which MFU is a part; if not set, what is
    known of its GPU: no MFU on a CPU, or on a GPU that is not known."""

    ddp: Mapping[str, Any] = field(default_factory=dict)
    """Any field of the installed Megatron-Core's `DistributedDataParallelConfig`, by name."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Any other field of the installed Megatron-Core's `OptimizerConfig`, by name."""

    def evaluates_after(self, step: int) -> bool:
        """Say whether a validation follows this step."""
        return step == self.steps or (self.eval_every is not None and step % self.eval_every == 0)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When sharded checkpoints are written, and which weights a run starts from."""

    save: bool = True
    """Write checkpoints: after the last step, and every `save_every`."""
    save_every: int | None = None
    """Steps between checkpoints; only after the last step if not set."""
    load: str | None = None
    """Start from the weights of this checkpoint, at step 0, with a new optimizer."""
    keep: int | None = None
    """Checkpoints that are kept: older ones are removed once a new one is whole; all if not set."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does to the run; after the last step it is an error
    either way."""
    async_save: bool = False
    """Write checkpoints while the run goes on, from a copy of its state; one at a time."""
    verify: Literal["on", "off"] = "on"
    """Hold a checkpoint's files against their hashes before anything is loaded."""

    def saves_after(self, step: int, last: int, *, stops: bool = False) -> bool:
        """Say whether a checkpoint is written after this step, at which the run `stops` or not."""
        every = self.save_every is not None and step % self.save_every == 0
        return self.save and (every or stops or step == last)

    def can_miss(self, step: int, last: int) -> bool:
        """Say whether the run goes on if its checkpoint after this step cannot be written."""
        return self.on_failure == "continue" and step < last


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole: what `recipe.toml` holds and what a recipe module defines."""

    name: str
    """The name of the recipe, and of its run folder; of one of your own, its file: `__file__`."""
    model: Model = field(default_factory=Model)
    """What is trained."""
    data: Data = field(default_factory=Data)
    """What it is trained on."""
    training: Training = field(default_factory=Training)
    """How it is trained."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When it is saved, and what it starts from."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """How it is spread over ranks."""

    @property
    def title(self) -> str:
        """Return the name for a person: of a file `folder/my_model.py`, `my_model`."""
        return Path(self.name).stem if self.name.endswith(".py") else self.name

    def with_layout(self, **sizes: Any) -> Recipe:
        """Return the same recipe on another layout."""
        return replace(self, layout=replace(self.layout, **sizes))
