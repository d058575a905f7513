"""How far two layouts may be apart: what rounding alone can do, and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mcore_lab.config import Recipe

_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-9}


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest relative differences that rounding explains.

    Layouts add the same terms in another order. The error of a sum of n terms grows as the unit
    roundoff u times the square root of n (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), and the
    layers of a model pass it on; the factors in front are the margin for that, measured on clean
    layouts and rounded up. Under bf16 sums are kept in fp32 and rounded once, so n does not count.
    """

    activation: float
    loss: float
    gradient: float
    update: float
    """Of a weight, relative to how far training has moved it. Adam divides by the gradient's own
    size, so that elements whose gradient is rounding noise move as far as others: they are left
    out, see `noise`."""
    moment: float
    """Of Adam's moments. After the first step they know of the elements that are left out of
    `update`, by what these do to the gradients of others."""
    noise: float
    """Elements are noise whose first gradient, or root of the second moment, is below this share
    of their tensor's."""

    def loss_of(self, step: int) -> float:
        """Return what a loss may be off by after `step` steps, counted from 0.

        From the second step on it is of weights that may be apart, by `update` of what they have
        moved, and a step changes the loss by some percent of itself. So does a token that is about
        to change its experts: which side it comes down on is up to rounding.
        """
        return self.loss if step == 0 else self.loss * (step + 1) ** 0.5 + self.update / 20

    @classmethod
    def of(cls, recipe: Recipe, steps: int) -> Tolerances:
        """Return what the recipe's arithmetic allows after `steps` steps."""
        bf16 = recipe.training.precision == "bf16"
        roundoff = _ROUNDOFF[recipe.training.precision]
        tokens = recipe.data.global_batch_size * recipe.data.sequence_length
        width = recipe.model.ffn_hidden_size or 4 * recipe.model.hidden_size
        of_sum, of_layer = (1.0, 1.0) if bf16 else (math.sqrt(tokens), math.sqrt(width))
        gradient = 32 * roundoff * of_sum
        return cls(
            activation=16 * roundoff * of_layer,
            loss=8 * roundoff * of_sum,
            gradient=gradient,
            update=min(0.5, 20 * gradient * steps),
            moment=min(0.75, 16 * gradient * steps),
            noise=min(0.1, 100 * gradient),
        )
