"""Scores: from statistics to how well each neuron serves each value, and which way to shift it.

A score is a plain function `Statistics -> Scored`. Scores are comparable between the neurons of one value; the sign of
a shift makes its own score positive where shifting helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .statistics import Statistics


@dataclass(frozen=True)
class Scored:
    """What a score says. `V` values, `L` layers, `N` neurons.

    Args:
        score (`torch.Tensor`): Float32 `[V, L, N]`; the higher, the more a neuron serves the value.
        shift (`torch.Tensor`): Float32 `[V, L, N]`; how to shift it, in proportion to each other.
    """

    score: torch.Tensor
    shift: torch.Tensor


def attribution(statistics: Statistics) -> Scored:
    """Attribution patching: neurons that both carry the value and cause the choice.

    Score `J * D`, shift `D`: J is the derivative of the value's margin with respect to a constant shift of the neuron,
    D the difference of its mean activation between the value's replies and those that compete with it. To first order
    the score is what the margin gains when the neuron alone moves the way in which it moves by itself (attribution
    patching, Nanda 2023; Syed et al. 2023, arXiv 2310.10348; on the competing contrast of DESIGN section 6, ours).

    Args:
        statistics ([`Statistics`]): Sums of a pass.

    Returns:
        [`Scored`]: Scores in nats per token.
    """
    difference = statistics.mean_difference()
    return Scored(score=statistics.mean_gradient() * difference, shift=difference)


SCORES: dict[str, Callable[[Statistics], Scored]] = {"attribution": attribution}
"""All scores by name."""
