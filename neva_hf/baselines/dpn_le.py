"""DPN-LE: neurons that differ both much and reliably, shifted by their difference."""

from __future__ import annotations

import torch

from .hooks import adding
from .method import Evidence, Method
from .readings import Readings

QUANTILE, EFFECT = 0.995, 0.8


def dpn_le(evidence: Evidence, *, quantile: float = QUANTILE, effect: float = EFFECT) -> Method:
    """Dual Personality Neuron Localization and Editing (Zheng et al. 2026, arXiv 2604.27929; as in its code).

    Of what each down projection reads at the last token, the neurons whose |mean difference| is above the layer's 0.995
    quantile and whose |Cohen's d| is above 0.8 are shifted by strength times the mean difference, at all positions.

    There a trait's texts are held against those of its opposite; here a value's replies against the competing ones. A value
    none of whose neurons has such an effect keeps those above the quantile alone, and the notes say so.

    Args:
        evidence ([`Evidence`]): What to learn from.
        quantile (`float`): Of |mean difference|, per layer.
        effect (`float`): The least |Cohen's d|.

    Returns:
        [`Method`]: Strength 1 shifts by the mean difference.

    Raises:
        `NeVAError`: If no training scenario contrasts one of the values.
    """
    readings = evidence.readings
    chosen, without = chosen_neurons(readings, quantile, effect)
    shifts = torch.where(chosen, readings.mean_difference(), 0.0)
    vectors = dict(zip(readings.modules, shifts.unbind(1), strict=True))
    counts = {value: int(row.sum()) for value, row in zip(readings.values, chosen, strict=True)}
    notes: dict[str, object] = {"neurons": counts}
    if without:
        notes["without_effect_size"] = without
    return Method(
        "DPN-LE", readings.values, adding(evidence.model, readings.values, vectors, at_input=True), notes=notes
    )


def chosen_neurons(
    readings: Readings, quantile: float = QUANTILE, effect: float = EFFECT
) -> tuple[torch.Tensor, list[str]]:
    """The neurons of each value, bool `[V, L, N]`, and the values that have none with the wanted effect. See [`dpn_le`]."""
    size = readings.mean_difference().abs()
    # (value by value: `quantile` takes no more than 16 million numbers)
    large = torch.stack([one > one.quantile(quantile, dim=1, keepdim=True) for one in size])
    both = large & (readings.cohens_d().abs() > effect)
    found = both.any(2).any(1)
    without = [value for value, one in zip(readings.values, found.tolist(), strict=True) if not one]
    return torch.where(found[:, None, None], both, large), without
