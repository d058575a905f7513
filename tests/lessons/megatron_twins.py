"""The lessons' layers beside Megatron-Core's, from the same weights: how far they are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcore_lab import cpu

cpu.preload()

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from mcore_lab.layout import ParallelLayout  # noqa: E402
from mcore_lab.lessons import transformer, vocabulary_parallel  # noqa: E402
from mcore_lab.lessons.vocabulary_parallel import parallel_cross_entropy  # noqa: E402
from mcore_lab.runtime import World, model_parallel  # noqa: E402

CONFIG = transformer.Config(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    ffn_hidden_size=48,
    max_sequence_length=16,
    causal=True,
)
SHAPE = 12, 2
"""Tokens of a sequence, and sequences: [s, b]."""

_THEIR_NAMES = {
    "norm1": "input_layernorm",
    "attention": "self_attention",
    "qkv": "linear_qkv",
    "proj": "linear_proj",
    "norm2": "pre_mlp_layernorm",
    "fc1": "linear_fc1",
    "fc2": "linear_fc2",
    "embedding": "embedding.word_embeddings",
    "positions": "embedding.position_embeddings.weight",
    "blocks": "decoder.layers",
    "norm": "decoder.final_layernorm",
    "head": "output_layer",
}

Differences = dict[str, float]


def differences_on_rank(ranks: int) -> dict[str, Differences]:
    """Return, for each layer, how far its outputs and gradients are from Megatron-Core's."""
    with model_parallel(ParallelLayout(tensor_model_parallel_size=ranks)) as world:
        twins = Twins(world)
        return {
            **twins.block(causal=True),
            **{f"{name}, no mask": found for name, found in twins.block(causal=False).items()},
            "embedding": twins.embedding(),
            "cross-entropy": twins.cross_entropy(),
            "model": twins.model(),
        }


class Twins:
    """This rank's parts of both."""

    def __init__(self, world: World) -> None:
        assert dist.group.WORLD
        self.world, self.group, self._draws = world, dist.group.WORLD, 0
        self.config = TransformerConfig(
            num_layers=CONFIG.num_layers,
            hidden_size=CONFIG.hidden_size,
            num_attention_heads=CONFIG.num_attention_heads,
            ffn_hidden_size=CONFIG.ffn_hidden_size,
            tensor_model_parallel_size=world.size,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
        )

    def block(self, causal: bool) -> dict[str, Differences]:
        """Of a block and its parts."""
        config = dataclasses.replace(CONFIG, causal=causal)
        ours = transformer.Block(config, self.group, lambda o, i: self.drawn(o, i) / i**0.5)
        spec = get_gpt_layer_local_spec()
        if not causal:
            spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
        theirs: Any = build_module(spec, config=self.config, layer_number=1)
        self.give_weights(ours, theirs)

        inner = CONFIG.ffn_hidden_size // self.world.size
        x, part = self.drawn(*SHAPE, CONFIG.hidden_size), self.drawn(*SHAPE, inner, own=True)
        weights, part_weights = self.drawn(*x.shape), self.drawn(*part.shape, own=True)
        attention, mlp = theirs.self_attention, theirs.mlp
        return {
            "column-parallel linear": apart(ours.mlp.fc1, mlp.linear_fc1, x, part_weights),
            "row-parallel linear": apart(ours.mlp.fc2, mlp.linear_fc2, part, weights),
            "MLP": apart(ours.mlp, mlp, x, weights),
            "attention": apart(ours.attention, attention, x, weights, attention_mask=None),
            "block": apart(ours, theirs, x, weights, attention_mask=None),
        }

    def embedding(self) -> Differences:
        """Of a vocabulary that is divisible: Megatron-Core's has no other."""
        whole = self.drawn(CONFIG.vocab_size, CONFIG.hidden_size)
        ours = vocabulary_parallel.VocabParallelEmbedding(whole, self.group)
        theirs = VocabParallelEmbedding(
            *whole.shape, init_method=nn.init.zeros_, config=self.config, tp_group=self.group
        )
        self.give_weights(ours, theirs)
        return apart(ours, theirs, self.words(), self.drawn(*SHAPE, CONFIG.hidden_size))

    def cross_entropy(self) -> Differences:
        logits = 10 * self.drawn(*SHAPE, CONFIG.vocab_size // self.world.size, own=True)
        first = vocabulary_parallel.first_word(CONFIG.vocab_size, self.group)
        targets, weights = self.words(), self.drawn(*SHAPE)

        def ours(logits: Tensor) -> Tensor:
            return parallel_cross_entropy(logits, targets, first, self.group)

        def theirs(logits: Tensor) -> Tensor:
            # It writes over the logits that it is given.
            return vocab_parallel_cross_entropy(logits.clone(), targets)

        return apart(ours, theirs, logits, weights)

    def model(self) -> Differences:
        """Of a whole model: each token's loss, and the gradient of every parameter."""
        ours = transformer.Transformer(CONFIG, self.group)
        theirs = GPTModel(
            self.config,
            get_gpt_layer_local_spec(),
            CONFIG.vocab_size,
            CONFIG.max_sequence_length,
            position_embedding_type="learned_absolute",
        )
        # Theirs has no bias of the head: ours is zero, and its gradient is left out.
        ours.head.bias.requires_grad_(False)
        self.give_weights(ours, theirs)
        targets, places = self.words(), torch.arange(SHAPE[0]).expand(SHAPE[1], -1)

        def our_losses(words: Tensor) -> Tensor:
            return parallel_cross_entropy(ours(words), targets, ours.embedding.first, self.group)

        def their_losses(words: Tensor) -> Tensor:
            return theirs(words.t(), places, None, labels=targets.t()).t()

        weights = self.drawn(*SHAPE)
        return apart(our_losses, their_losses, self.words(), weights, modules=(ours, theirs))

    def drawn(self, *shape: int, own: bool = False) -> Tensor:
        """Return random numbers, the same on all ranks if they are not each rank's own."""
        return torch.randn(shape, generator=self._generator(own))

    def words(self) -> Tensor:
        return torch.randint(CONFIG.vocab_size, SHAPE, generator=self._generator())

    def _generator(self, own: bool = False) -> torch.Generator:
        self._draws += 1
        return torch.Generator().manual_seed(self._draws + 1000 * self.world.rank * own)

    @torch.no_grad()
    def give_weights(self, ours: nn.Module, theirs: nn.Module) -> None:
        """Give both the same weights, of which none is what a layer usually begins with."""
        their_parameters = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            if weight.requires_grad:
                weight += 0.1 * self.drawn(*weight.shape, own=hasattr(weight, "is_part"))
                their_parameters.pop(their_name(name)).copy_(weight)
        assert not their_parameters


def their_name(name: str) -> str:
    """Return what Megatron-Core calls a parameter of the lesson's."""
    return ".".join(_THEIR_NAMES.get(part, part) for part in name.split("."))


def apart(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    x: Tensor,
    weights: Tensor,
    modules: tuple[nn.Module, nn.Module] | None = None,
    **their_arguments: Any,
) -> Differences:
    """Return how far outputs are apart, and the gradients of their sum as `weights` has it.

    Of the input, and of the parameters of `modules`; those of what is called if not given. Each is
    the largest difference, relative to the largest number.
    """
    our_module, their_module = modules or (ours, theirs)
    one = with_gradients(ours, our_module, x, weights, their_name)
    other = with_gradients(theirs, their_module, x, weights, str, **their_arguments)
    assert one.keys() == other.keys()
    return {
        name: float((one[name] - other[name]).abs().max() / other[name].abs().max())
        for name in other
    }


def with_gradients(
    call: Callable[..., Any],
    module: Any,
    x: Tensor,
    weights: Tensor,
    named: Callable[[str], str],
    **arguments: Any,
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(x.is_floating_point())
    parameters = {}
    if isinstance(module, nn.Module):
        module.zero_grad()
        parameters = {n: weight for n, weight in module.named_parameters() if weight.requires_grad}
    output = call(x, **arguments)
    if isinstance(output, tuple):
        # Megatron-Core's layers leave it to the next to add their bias.
        output = output[0] if output[1] is None else output[0] + output[1]
    (output * weights).sum().backward()
    gradients = {named(name): weight.grad for name, weight in parameters.items()}
    of_input = {} if x.grad is None else {"x": x.grad}
    return {"output": output.detach(), **of_input, **gradients}
