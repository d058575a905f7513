"""Expert parallelism: each rank holds some of the experts, and tokens travel to those they chose.

Why: where a token goes through k of N feed-forward networks, a model has N / k times the weights
for the same work. Ranks share the experts: tokens are sorted by expert, the ranks tell each other
how many will come (an all-to-all of counts), send them (an all-to-all of tokens), apply their
experts and send back what they made. Weighed by the router, that adds up to the token's output.
Nothing makes tokens choose evenly, and the fullest rank is waited for. The auxiliary loss pushes
the router to it: N Σ f_i P_i, with f_i the share of choices that fell on expert i, and P_i the mean
probability that the router gave it. It is 1 if all are even, N / k at worst.

What to look at: how many tokens each expert and each rank got, the bytes that were sent for it, and
that output and gradients are those of one rank that holds every expert.
Source: Fedus et al., arXiv:2101.03961 (Switch Transformer); Lepikhin et al., arXiv:2006.16668.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcore_lab.errors import ConfigError
from mcore_lab.lessons import ranks
from mcore_lab.lessons.start import main
from mcore_lab.runtime import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    num_experts: int = 8
    """N: experts of all ranks together, shared evenly."""
    topk: int = 2
    """k: experts that a token goes to."""
    tokens: int = 512
    """Tokens of each rank."""
    hidden_size: int = 64
    """Width of a token."""
    ffn_hidden_size: int = 128
    """Width of an expert between its two matrices."""
    alike: float = 0.5
    """How much tokens have in common: more of it, and more of them choose the same experts."""
    aux_loss_coeff: float = 0.01
    """Weight of the auxiliary loss in the loss."""
    seed: int = 42
    """Decides weights and data."""


class Router(nn.Module):
    """Chooses k experts for each token; the same on every rank."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.topk = settings.topk
        draw = torch.Generator().manual_seed(settings.seed)
        weight = torch.randn(settings.num_experts, settings.hidden_size, generator=draw)
        self.weight = nn.Parameter(weight * settings.hidden_size**-0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for tokens `[t, h]` their weights and experts `[t, k]`, and the auxiliary loss."""
        probs = F.linear(tokens, self.weight).softmax(-1)
        weights, experts = probs.topk(self.topk)
        shares = experts.flatten().bincount(minlength=probs.size(1)) / experts.numel()
        # Counts have no gradient: what is pushed is the probabilities.
        aux_loss = probs.size(1) * (shares * probs.mean(0)).sum()
        return weights, experts, aux_loss


class Expert(nn.Module):
    """A feed-forward network of tokens `[t, h]`; its weights are the same whoever builds it."""

    def __init__(self, settings: Settings, number: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(settings.seed + 1 + number)
        wide, narrow = settings.ffn_hidden_size, settings.hidden_size
        self.fc1 = nn.Parameter(torch.randn(wide, narrow, generator=draw) * narrow**-0.5)
        self.fc2 = nn.Parameter(torch.randn(narrow, wide, generator=draw) * wide**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(tokens, self.fc1)), self.fc2)


class AllToAll(torch.autograd.Function):
    """Send the next `sent[r]` rows to each rank r, and return the `received[r]` that it sends."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        arrived = rows.new_empty(sum(received), rows.size(1))
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The same the other way: each row's gradient goes to where the row came from."""
        return AllToAll.apply(grads[0], ctx.received, ctx.sent), None, None


class Experts(nn.Module):
    """A mixture of experts, all of them on one rank."""

    def __init__(self, settings: Settings, held: range) -> None:
        super().__init__()
        self.router = Router(settings)
        self.experts = nn.ModuleList(Expert(settings, number) for number in held)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return for tokens `[t, h]` the output `[t, h]` and the auxiliary loss."""
        weights, chosen, aux_loss = self.router(tokens)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            output = output + (weights * (chosen == number)).sum(1, keepdim=True) * expert(tokens)
        return output, aux_loss


class ExpertsOfRank(Experts):
    """The same for this rank's tokens, with as many of the experts as every other rank holds."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen, aux_loss = self.router(tokens)
        local, size = len(self.experts), dist.get_world_size()
        # A row for each choice of each token, sorted by expert, and so by rank.
        order = chosen.flatten().argsort(stable=True)
        token_of_row = order // chosen.size(1)
        counts = chosen.flatten().bincount(minlength=size * local).view(size, local)
        self.arrived = torch.empty_like(counts)
        dist.all_to_all_single(self.arrived, counts)
        sent, received = counts.sum(1).tolist(), self.arrived.sum(1).tolist()
        rows = AllToAll.apply(tokens[token_of_row], sent, received)

        # From each rank they come expert by expert: sort them by expert alone.
        expert_of_row = torch.arange(local, device=rows.device).repeat(size)
        by_expert = expert_of_row.repeat_interleave(self.arrived.flatten()).argsort(stable=True)
        of_experts = rows[by_expert].split(self.arrived.sum(0).tolist())
        done = [expert(part) for expert, part in zip(self.experts, of_experts, strict=True)]
        rows = torch.empty_like(rows).index_copy(0, by_expert, torch.cat(done))

        rows = AllToAll.apply(rows, received, sent) * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, token_of_row, rows), aux_loss


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Run the layer on each rank's own tokens, and hold it to all experts on one rank."""
    n, experts, k, device = world.size, settings.num_experts, settings.topk, world.device.type
    ranks.require_shared(settings, "num_experts", n, f"{n} ranks")
    if k > experts:
        raise ConfigError(f"--topk must not be above --num-experts, {experts}; it is {k}")
    held = range(world.rank * experts // n, (world.rank + 1) * experts // n)
    shape = n, settings.tokens, settings.hidden_size
    draw = torch.Generator().manual_seed(settings.seed + 1 + experts)
    common = settings.alike * torch.randn(shape[2], generator=draw)
    drawn = torch.randn(shape, generator=draw) + common
    of_ranks = [tokens.to(device).requires_grad_() for tokens in drawn]
    own = drawn[world.rank].to(device, copy=True).requires_grad_()

    def step(layer: Experts, tokens: Tensor) -> tuple[Tensor, Tensor]:
        output, aux_loss = layer(tokens)
        (output.square().mean() + settings.aux_loss_coeff * aux_loss).backward()
        return output.detach(), aux_loss.detach()

    layer = ExpertsOfRank(settings, held).to(device)
    output, aux_loss = step(layer, own)
    # The router, which each rank has, saw its own tokens; an expert has had those of all ranks.
    dist.all_reduce(layer.router.weight.grad)
    grads = [own.grad, *(weight.grad for weight in layer.parameters())]

    whole = Experts(settings, range(experts)).to(device)
    results = [step(whole, tokens)[0] for tokens in of_ranks]
    weights = [whole.router.weight, *whole.experts[held.start : held.stop].parameters()]
    expected = [of_ranks[world.rank].grad, *(weight.grad for weight in weights)]

    # Own tokens away, and those of others back.
    arrived, stayed = layer.arrived.sum().item(), layer.arrived[world.rank].sum().item()
    sent = (k * len(own) - stayed) + (arrived - stayed)
    row = {
        "rank": world.rank,
        "experts": list(held),
        "tokens of each": layer.arrived.sum(0).tolist(),
        "in all": arrived,
        "bytes sent": sent * own[0].nbytes,
        "auxiliary loss": aux_loss.item(),
        "output off by": ranks.largest_difference([output], [results[world.rank]]),
        "gradients off by": ranks.largest_difference(grads, expected),
    }
    found = {"ranks": ranks.rows_of_all(row)}
    if world.is_first:
        ranks.print_rows(found["ranks"])
        print(f"\nIf all were even: {k * settings.tokens} tokens a rank, an auxiliary loss of 1.")
        print("Bytes are those of the forward pass; the backward pass sends as many again.")
    return found


if __name__ == "__main__":
    main(Settings, lesson)
