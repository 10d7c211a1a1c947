"""Methods beside each other: the numbers of a table, and how each of them is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from neva_hf.errors import NeVAError
from neva_hf.evaluation import plot_style as style

Interval = float | Sequence[float]
"""A number, or a number with the lower and the upper end of its interval (which need not lie around it)."""


@dataclass(frozen=True)
class Measure:
    """How a number of a table is shown.

    Args:
        label (`str`): What it is, with its unit.
        better (`str`): `"more"` or `"less"`.
        neutral (`float`): Its value where nothing was changed; bars start there.
        digits (`int`): Decimals.
    """

    label: str
    better: Literal["more", "less"]
    neutral: float = 0.0
    digits: int = 2


MEASURES: dict[str, Measure] = {
    "target": Measure("control: target's margin, nats per token", "more"),
    "csr": Measure("control: rise of the success rate, share of choices", "more"),
    "nlr": Measure("leakage (NLR): others' shift over the target's", "less"),
    "own_over_other": Measure("own over other: target's shift divided by the others'", "more", digits=1),
    "kl": Measure("damage: KL divergence, nats per token", "less", digits=3),
    "perplexity_ratio": Measure("damage: perplexity, base model = 1", "less", neutral=1.0, digits=3),
    "capability": Measure("capability: accuracy, share of questions", "more"),
}
"""Measures by the names that tables use."""

NOTHING = (math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class MethodPoint:
    """What one method does at one strength.

    Args:
        method (`str`): Its name, as it is written beside its point.
        strength (`float`): Of which the sign counts: methods are drawn apart for dialling up and down.
        measures (`Mapping[str, Interval]`): Name of a measure -> number, or number with both ends of its interval. Shifts
            count the way the target was dialled, so that more control is larger for both signs.
    """

    method: str
    strength: float
    measures: Mapping[str, Interval] = field(default_factory=dict)


def interval(given: Interval | None) -> tuple[float, float, float]:
    """A number with both ends; both are the number itself where there are none, all are NaN where it is missing.

    Example:

    ```py
    >>> interval([0.35, 0.33, 0.38]), interval(0.35)
    ((0.35, 0.33, 0.38), (0.35, 0.35, 0.35))
    ```
    """
    numbers = [math.nan] if given is None else [given] if isinstance(given, (int, float)) else list(given)
    numbers = [math.nan if number is None else float(number) for number in numbers]
    if len(numbers) not in (1, 3):
        raise NeVAError(f"A measure is a number, or a number with two ends of its interval, got {given!r:.80}.")
    middle, low, high = numbers if len(numbers) == 3 else numbers * 3
    if not math.isfinite(middle):
        return NOTHING
    return middle, low if math.isfinite(low) else middle, high if math.isfinite(high) else middle


def signs_of(points: Sequence[MethodPoint], names: Sequence[str], known: Mapping[str, Measure]) -> list[int]:
    """The signs that occur, + first, once it is sure that there is something to draw."""
    if not points or not names:
        raise NeVAError("There is nothing to draw: give at least one method and one measure.")
    for name in names:
        if name not in known:
            raise NeVAError(f"The measure {name!r} is not described: pass `measures={{{name!r}: Measure(...)}}`.")
    return [sign for sign in (1, -1) if any((point.strength > 0) == (sign > 0) for point in points)]


def way_text(points: Sequence[MethodPoint]) -> str:
    """What is written over the methods of one sign."""
    strengths = sorted({point.strength for point in points})
    return f"dialled to {' and '.join(style.strength_text(strength) for strength in strengths)}"


def alt_text(
    points: Sequence[MethodPoint], signs: Sequence[int], names: Sequence[str], known: Mapping[str, Measure]
) -> str:
    """What both pictures of methods show: who is best at what, for either sign."""
    methods = list(dict.fromkeys(point.method for point in points))
    said = [
        f"{len(methods)} methods ({', '.join(methods)}) compared by {'; '.join(known[name].label for name in names)}."
    ]
    for sign in signs:
        shown = [point for point in points if (point.strength > 0) == (sign > 0)]
        best = []
        for name in names:
            measure = known[name]
            found = {point.method: interval(point.measures.get(name)) for point in shown}
            numbers = {method: one[0] for method, one in found.items() if not np.isnan(one[0])}
            if not numbers:
                continue
            pick = max if measure.better == "more" else min
            leader = pick(numbers, key=lambda method: numbers[method])
            what = measure.label.split(":")[0]
            most = "Most" if measure.better == "more" else "Least"
            rest = [f"{method} {number:.{measure.digits}f}" for method, number in numbers.items() if method != leader]
            others = f" ({', '.join(rest)})" if rest else ""
            best.append(f"{most} {what}: {leader} {numbers[leader]:.{measure.digits}f}{others}.")
        said.append(f"{way_text(shown).capitalize()}: {' '.join(best)}")
    return " ".join(said).replace(" -", " −")
