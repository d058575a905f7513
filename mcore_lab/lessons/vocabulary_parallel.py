"""A vocabulary split over the ranks: the embedding, and the loss without whole logits.

Why: embedding and head are the largest matrices of many models, and the logits, a number for each
word and each token, are larger than any other activation. Split all three by words. A rank looks up
the tokens that it has rows for and leaves zeros for the others: the sum over the ranks is the
embedding. The loss of a token is log(sum of exp(logits)) - (logit of its target): no rank needs
the logits of others for it, only three numbers a token. First the largest logit of all, which is
taken off them lest exp overflow; then the sum, and the target's logit, which one rank has.

What to look at: who holds which words (their number need not divide by that of the ranks), and that
losses and gradients are those of torch's own functions on one rank, where logits are large as well.
Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mcore_lab.errors import ConfigError
from mcore_lab.lessons.start import main
from mcore_lab.lessons.tensor_parallel import SumOverRanks, part_of
from mcore_lab.report.tables import print_table
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    vocab_size: int = 1001
    """v, the number of words."""
    hidden_size: int = 64
    """h, the width of the model."""
    tokens: int = 32
    """How many tokens there are, the same on all ranks."""
    scale: float = 100.0
    """How large the logits are; exp(89) is no number in fp32 any more."""
    seed: int = 42
    """Decides all numbers."""


def first_word(vocab_size: int, group: ProcessGroup) -> int:
    """Return the first word of this rank's part: the parts are as even as can be."""
    each, more = divmod(vocab_size, group.size())
    return each * group.rank() + min(more, group.rank())


def places(words: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return which of the words are among this rank's, and their places there (0 for others)."""
    place = words - first
    here = (place >= 0) & (place < count)
    return here, place.where(here, 0)


class VocabParallelEmbedding(nn.Module):
    """Words to vectors, `[...]` to `[..., h]` on all ranks; the whole table is `[v, h]`."""

    def __init__(self, whole: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.first = first_word(len(whole), group)
        self.weight = part_of(whole, 0, group)

    def forward(self, words: Tensor) -> Tensor:
        here, place = places(words, self.first, len(self.weight))
        vectors = F.embedding(place, self.weight) * here.unsqueeze(-1)
        return SumOverRanks.apply(vectors, self.group)


def parallel_cross_entropy(
    logits: Tensor, targets: Tensor, first: int, group: ProcessGroup
) -> Tensor:
    """Return each token's loss `[...]`, from this rank's logits `[..., v / n]` and its target.

    `first` is the word of the first of the logits. The loss is the same on all ranks.
    """
    largest = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    logits = logits - largest
    here, place = places(targets, first, logits.shape[-1])
    of_target = logits.gather(-1, place.unsqueeze(-1)).squeeze(-1) * here
    # Both are sums over the ranks: one all-reduce for the two.
    total, of_target = SumOverRanks.apply(torch.stack([logits.exp().sum(-1), of_target]), group)
    return total.log() - of_target


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Embed tokens and predict them, with the vocabulary split, and with torch's own functions."""
    v, h, device = settings.vocab_size, settings.hidden_size, world.device.type
    if v < world.size:
        raise ConfigError(f"--vocab-size must not be below {world.size}, the ranks; it is {v}")
    group = dist.group.WORLD
    assert group
    draw = torch.Generator().manual_seed(settings.seed)
    table = torch.randn(v, h, generator=draw)
    logits = (settings.scale * torch.randn(settings.tokens, v, generator=draw)).to(device)
    words = torch.randint(v, (settings.tokens,), generator=draw).to(device)

    embedding = VocabParallelEmbedding(table, group).to(device)
    own = logits.tensor_split(world.size, -1)[world.rank].clone().requires_grad_()
    losses = parallel_cross_entropy(own, words, embedding.first, group)
    (embedding(words).square().sum() + losses.sum()).backward()

    whole, logits = nn.Parameter(table.to(device)), logits.requires_grad_()
    expected = F.cross_entropy(logits, words, reduction="none")
    (F.embedding(words, whole).square().sum() + expected.sum()).backward()
    assert whole.grad is not None and logits.grad is not None
    first, count = embedding.first, len(embedding.weight)
    mine = slice(first, first + count)
    row = {
        "words": f"{first} to {first + count - 1}",
        "tokens among them": int(places(words, first, count)[0].sum()),
        "vectors": difference(embedding(words), F.embedding(words, whole)),
        "their gradient": difference(embedding.weight.grad, whole.grad[mine]),
        "losses": difference(losses, expected),
        "their gradient ": difference(own.grad, logits.grad[:, mine]),
    }
    rows: list[Any] = [None] * world.size
    dist.all_gather_object(rows, row)
    if world.is_first:
        print_table(["rank", *row], [[rank, *each.values()] for rank, each in enumerate(rows)])
        print(
            "\nvectors, losses and gradients: largest difference from those of one rank, as a part"
        )
        print(f"of the largest. The losses are {expected.min():.0f} to {expected.max():.0f}.")
    return {"ranks": rows, "losses": losses.tolist()}


def difference(ours: Any, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number that is expected."""
    return float((ours - expected).detach().abs().max() / expected.detach().abs().max())


if __name__ == "__main__":
    main(Settings, lesson)
