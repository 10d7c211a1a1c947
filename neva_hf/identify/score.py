"""Scores: from statistics to how well each neuron serves each value, and which way to shift it.

A score is a plain function `Statistics -> Scored`. Scores are comparable between the neurons of one value; the sign of
a shift makes its own score positive where shifting helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from neva_hf.errors import NeVAError

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


def gradient(statistics: Statistics) -> Scored:
    """The neurons whose shift moves the margin most, whether or not the value makes them move.

    With `g = J * s`, the derivative of the margin in units of the neuron's standard deviation s over tokens: score `|g|`,
    shift `g * s`. (Ours; DESIGN section 6.)

    Args:
        statistics ([`Statistics`]): Sums of a pass.

    Returns:
        [`Scored`]: Scores in nats per token and standard deviation.
    """
    deviation = statistics.variance().sqrt()
    slope = statistics.mean_gradient() * deviation
    return Scored(score=slope.abs(), shift=slope * deviation)


def contrast(statistics: Statistics) -> Scored:
    """The neurons whose activation tells the value apart, whether or not they cause anything.

    Score `|D| / s`, Cohen's d with the deviation s between replies to the same question; shift D, the mean activation
    difference. CNA ranks by the mean difference, DPN-LE by mean difference and Cohen's d.

    Args:
        statistics ([`Statistics`]): Sums of a pass.

    Returns:
        [`Scored`]: Scores in standard deviations.
    """
    difference = statistics.mean_difference()
    deviation = statistics.deviation()
    return Scored(score=torch.where(deviation > 0, difference.abs() / deviation, 0.0), shift=difference)


def probability(statistics: Statistics) -> Scored:
    """The neurons that are active on more (or fewer) tokens of the value's replies.

    Score `|P|`, the difference of the share of tokens at which the neuron's activation is above 0, as NPTI ranks (there
    it is the activation function's output that is compared with 0); shift D, the mean activation difference.

    Args:
        statistics ([`Statistics`]): Sums of a pass.

    Returns:
        [`Scored`]: Scores from 0 to 1.
    """
    return Scored(score=statistics.mean_activity().abs(), shift=statistics.mean_difference())


def probe(statistics: Statistics) -> Scored:
    """The neurons that raise a linear value probe's logit when they move as they do by themselves.

    Score `a * D`, shift D: D is the mean activation difference, and a what a unit of the neuron adds, through its
    down-projection column, to the logit of the value's probe of what its layer writes (probe.py). Over all neurons of a
    layer the scores add up to the difference of the probe's mean logits, so a score is the neuron's own part in it.
    Neurons that work against the probe have a negative score, and are never chosen. (Public summaries of NeVA, Yang et
    al. 2026, describe probes and contributions through columns; the formula is ours.)

    Args:
        statistics ([`Statistics`]): Sums of a pass with `probes=True`, after [`with_logits_per_unit`].

    Returns:
        [`Scored`]: Scores in logits.

    Raises:
        `NeVAError`: If the statistics hold no probes.
    """
    if statistics.logit_per_unit is None:
        missing = "neither their sums nor" if statistics.scatter is None else "no word on"
        raise NeVAError(
            f"The score 'probe' needs value probes, and these statistics hold {missing} what each neuron adds to their "
            "logits: collect with probes=True, then score what with_logits_per_unit(model, statistics) returns."
        )
    difference = statistics.mean_difference()
    return Scored(score=statistics.logit_per_unit * difference, shift=difference)


SCORES: dict[str, Callable[[Statistics], Scored]] = {
    "attribution": attribution,
    "gradient": gradient,
    "contrast": contrast,
    "probability": probability,
    "probe": probe,
}
"""All scores by name."""
