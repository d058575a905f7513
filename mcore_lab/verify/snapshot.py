"""What a run computed, put together from all its ranks: what two runs are compared by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Snapshot:
    """A run's numbers, by the names of one rank's model; tensors are whole, in fp32."""

    losses: list[list[float]] = field(default_factory=list)
    """Of each step, the mean loss a token of each micro-batch, in the order of their samples."""
    grad_norms: list[float] = field(default_factory=list)
    """Of each step, the norm that clipping used."""
    learning_rates: list[float] = field(default_factory=list)
    """Of each step."""
    auxiliary_losses: dict[str, list[float]] = field(default_factory=dict)
    """Of the first step, what the routers reported, a number a layer."""
    activations: Tensors = field(default_factory=dict)
    """Of the first micro-batch, `[s, b, h]`, in forward order."""
    gradients: Tensors = field(default_factory=dict)
    """Of the first step, reduced over all ranks, before they are clipped."""
    initial_weights: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    """After the last step."""
    moments: Tensors = field(default_factory=dict)
    """Adam's, after the last step, by `exp_avg.` and `exp_avg_sq.` and the weight's name."""
    torn: dict[str, tuple[float, str]] = field(default_factory=dict)
    """What should be the same on several ranks and is not: by how much of its norm, and where."""
