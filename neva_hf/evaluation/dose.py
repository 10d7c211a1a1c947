"""Dose curves of any method, from a few scenarios: what a dial does and costs at several strengths.

The same plain data as a map's own dose curves ([`~neva_hf.identify.dose.dose_curves`], whose formulas these are), so that
the same functions read and draw both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neva_hf.identify.dose import leakage

from .tables import LogProbs, plain
from .together import margin_table

TEXTS = 6
"""Neutral texts that the divergence is measured on."""


def curves(
    base: LogProbs,
    edited: Mapping[float, Mapping[str, LogProbs]],
    damage: Mapping[float, Mapping[str, Any]],
    observed: Sequence[str],
) -> dict[str, Any]:
    """Dose curves from log-probabilities.

    Args:
        base (`Sequence[Mapping[str, float]]`): Per scenario, reply key -> nats per token at strength 0.
        edited (`Mapping[float, Mapping[str, Sequence]]`): Strength -> value -> the same with the value dialled.
        damage (`Mapping[float, Mapping[str, Any]]`): Strength -> its cost, from [`steered_damage`], a setting per value.
        observed (`Sequence[str]`): The values to watch.

    Returns:
        `dict[str, Any]`: `{"source", "strengths", "scenarios", "texts", "curves": {value: {"kl", "leakage", "margins"}}}`;
        lists go along the ascending strengths.
    """
    strengths = sorted(edited)
    found: dict[str, Any] = {}
    for row, value in enumerate(edited[strengths[0]]):
        shifts: list[dict[str, float]] = []
        for strength in strengths:
            moved = {}
            for seen in observed:
                leave_out = () if seen == value else (value,)
                gap = margin_table(edited[strength][value], seen, leave_out) - margin_table(base, seen, leave_out)
                if not np.isnan(gap).all():
                    moved[seen] = float(np.nanmean(gap))
            shifts.append(moved)
        found[value] = {
            "kl": [
                plain(sum(damage[strength]["kl"][row]) / sum(damage[strength]["tokens"])) for strength in strengths
            ],
            "leakage": [
                leakage(moved, value, strength) if value in moved else None
                for moved, strength in zip(shifts, strengths, strict=True)
            ],
            "margins": {seen: [plain(moved[seen]) for moved in shifts] for seen in observed if seen in shifts[0]},
        }
    texts = len(damage[strengths[0]]["tokens"])
    return {"source": "this run", "strengths": strengths, "scenarios": len(base), "texts": texts, "curves": found}
