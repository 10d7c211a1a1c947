"""CNA: the few neurons that differ most between contrasted texts, scaled by a multiplier."""

from __future__ import annotations

import torch
from torch import nn

from neva_hf.errors import NeVAError

from .hooks import Change, Edit, per_row, steering
from .method import At, Evidence, Method
from .readings import STRONGEST, Readings

# A neuron that is among the strongest at more than this share of texts serves language, not a value.
UNIVERSAL = 0.8


def cna(evidence: Evidence, *, share: float = STRONGEST, signed: bool = False) -> Method:
    """Contrastive Neuron Attribution (Herring et al. 2026, arXiv 2605.12290, section 3).

    The neurons, 0.1% of all layers' together, with the largest |mean difference| of what the down projection reads at the
    last token, without those that are among the strongest 0.1% at more than 80% of the texts. Their activations are
    multiplied: with 0 they are switched off, with numbers above 1 amplified. Here the multiplier is 1 + strength, so that
    -1 switches off.

    There the last token is that of a prompt; here, with replies contrasted, that of the reply.

    Args:
        evidence ([`Evidence`]): What to learn from.
        share (`float`): The share of neurons to take.
        signed (`bool`): Whether neurons that move down with the value get 1 - strength instead. (Not in the paper, which
            has one multiplier for all.)

    Returns:
        [`Method`]: Strength s multiplies by 1 + s.

    Raises:
        `NeVAError`: If no neuron is left, or no training scenario contrasts one of the values.
    """
    readings = evidence.readings
    chosen = chosen_neurons(readings, share)
    factors = chosen.float()
    if signed:
        # Amplifying raises what is positive on average and lowers what is negative.
        level = readings.own_sum + readings.rival_sum
        factors = factors * (readings.mean_difference() * level).sign().float()
    at = multiplying(evidence.model, readings.values, dict(zip(readings.modules, factors.unbind(1), strict=True)))
    counts = {value: int(row.sum()) for value, row in zip(readings.values, chosen, strict=True)}
    return Method("CNA", readings.values, at, notes={"neurons": counts, "signed": signed})


def chosen_neurons(readings: Readings, share: float = STRONGEST) -> torch.Tensor:
    """The neurons of each value, bool `[V, L, N]`. See [`cna`].

    Raises:
        `NeVAError`: If the share is none, or no neuron is left.
    """
    if not 0 < share <= 1:
        raise NeVAError(f"`share` must be above 0 and at most 1, got {share}.")
    universal = readings.strong > UNIVERSAL * readings.replies
    score = readings.mean_difference().abs().masked_fill(universal, 0.0).flatten(1)
    best = score.topk(max(round(share * score.shape[1]), 1), dim=1)
    chosen = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, best.indices, best.values > 0)
    if not bool(chosen.any(1).all()):
        raise NeVAError("No neuron differs between the replies of one of the values and those that compete with it.")
    return chosen.reshape(readings.difference.shape)


def multiplying(model: nn.Module, values: list[str], factors: dict[str, torch.Tensor]) -> At:
    """Dials that multiply what modules read by 1 + the sum over values of strength times factor.

    Args:
        model (`nn.Module`): The model.
        values (`list[str]`): The values.
        factors (`dict[str, torch.Tensor]`): Down projection -> float32 `[V, N]`.

    Returns:
        `At`: For a [`Method`].
    """

    def multiplied(factor: torch.Tensor) -> Change:
        return lambda x, _: x * per_row(factor, x)

    def make(table: torch.Tensor) -> list[Edit]:
        found = {name: table @ each for name, each in factors.items()}
        return [Edit(name, multiplied(1 + one), at_input=True) for name, one in found.items() if bool(one.any())]

    return steering(model, values, make)
