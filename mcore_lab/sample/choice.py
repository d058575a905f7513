"""From the logits of the next token to the token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcore_lab.errors import ConfigError, NotFiniteError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a token is chosen. The options of `mcore-lab sample` have these names."""

    temperature: float = 1.0
    """What logits are divided by; with 0 the most probable token is taken."""
    top_k: int | None = None
    """Choose among so many of the most probable tokens only."""
    top_p: float | None = None
    """Choose among the fewest most probable tokens that have this probability together."""
    seed: int = 1234
    """Seed of the draws for the first prompt; each prompt's is one higher than the last one's."""

    def require_sensible(self) -> None:
        """Raise ConfigError for a value that means nothing."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature must not be below 0; it is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k must not be below 1; it is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be above 0 and at most 1; it is {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be from 0 to 2**63 - 1; it is {self.seed}")

    def token(self, logits: torch.Tensor, draw: torch.Generator) -> int:
        """Return the token chosen by logits `[v]`. Raises NotFiniteError if one is not finite.

        The draw is on the CPU and its noise does not depend on the logits: logits that differ in
        their last digits, as those of two layouts do, give the same token. Nucleus sampling
        (`top_p`): Holtzman et al., arXiv:1904.09751.
        """
        logits = logits.to("cpu", torch.float64)
        if not logits.isfinite().all():
            raise NotFiniteError("the model's logits are not finite: its weights are spoilt")
        if self.temperature == 0:
            return int(logits.argmax())
        ordered, tokens = ((logits - logits.max()) / self.temperature).sort(
            descending=True, stable=True
        )
        probabilities = ordered[: self.top_k].softmax(0)
        if self.top_p is not None:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.where(before < self.top_p, 0)
        # In the tokens' own order: two that are as good as equal may have changed places above.
        weights = torch.zeros_like(logits)
        weights[tokens[: self.top_k]] = probabilities
        return int(torch.multinomial(weights, 1, generator=draw))
