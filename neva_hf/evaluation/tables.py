"""What a method does as tables over scenarios, and the intervals of what is computed from them.

Every number of a report is a function of tables `[n scenarios, ...]` and of weights `[B, n]` that count how often each
scenario was drawn. The first row of the weights draws each scenario once, which is the estimate itself; the others are
bootstrap samples (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13: percentile intervals). So an
interval comes from the very formula of its estimate, and the intervals of two methods are paired when they get the same
weights. What a scenario says nothing about is NaN in a table and takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neva_hf.errors import NeVAError
from neva_hf.measure import contrast

LogProbs = Sequence[Mapping[str, float]]
"""Per scenario: reply key -> log-probability, nats per token."""

Interval = list[float | None]
"""`[estimate, low, high]`. The estimate is `None` where it is not defined, an end where the interval has none."""

DRAWS = 2000


@dataclass(frozen=True)
class Tables:
    """What one method does at strengths of one sign, by scenario.

    Shifts and moves at negative strengths are turned round, so that a fall counts as the rise that was wanted; numbers of
    choices are as they were counted.

    Args:
        targets (`list[str]`): The values that were dialled, T of them.
        observed (`list[str]`): The values that were watched, U of them, the targets among them.
        sign (`int`): 1 or -1.
        shifts (`np.ndarray`): `[n, T, U]`, nats per token: margin after minus before. For an observed value that is not
            the target, the target's reply is left out of its rivals: else every rise of the target would read as a fall.
        faced (`np.ndarray`): `[n, T, U]`: how many choices there are between the value's reply and a rival's.
        won_before (`np.ndarray`): `[n, T, U]`: how many of them the value's reply wins at strength 0 (ties count 1/2).
        won_after (`np.ndarray`): `[n, T, U]`: the same with the target dialled.
        moves (`np.ndarray`): `[n, T, P]`: of each pair of observed values the move of the first one's log-probability
            minus the second one's.
        first_before (`np.ndarray`): `[n, P]`: 1 where the first of the pair is likelier at strength 0, 0 where not.
        first_after (`np.ndarray`): `[n, T, P]`: the same with the target dialled.
    """

    targets: list[str]
    observed: list[str]
    sign: int
    shifts: np.ndarray
    faced: np.ndarray
    won_before: np.ndarray
    won_after: np.ndarray
    moves: np.ndarray
    first_before: np.ndarray
    first_after: np.ndarray

    @property
    def own(self) -> list[int]:
        """The column of each target."""
        return [self.observed.index(target) for target in self.targets]


def pairs_of(observed: Sequence[str]) -> list[tuple[int, int]]:
    """Every two of the observed values, as their columns."""
    return [(first, second) for second in range(len(observed)) for first in range(second)]


def tables(base: LogProbs, edited: Mapping[str, LogProbs], observed: Sequence[str], sign: int) -> Tables:
    """Compares log-probabilities with a value dialled to those at strength 0.

    Args:
        base (`Sequence[Mapping[str, float]]`): Per scenario, reply key -> nats per token at strength 0.
        edited (`Mapping[str, Sequence]`): Target -> the same with that value dialled.
        observed (`Sequence[str]`): The values to watch; the targets must be among them.
        sign (`int`): 1 or -1, the sign of the strengths.

    Returns:
        [`Tables`]: By scenario.

    Raises:
        `NeVAError`: If a target is not watched.
    """
    if missing := [target for target in edited if target not in observed]:
        raise NeVAError(f"The scenarios have no replies of {', '.join(missing)}, so its margin cannot be measured.")
    both = pairs_of(observed)
    shape = (len(base), len(edited), len(observed))
    shifts, faced, won_before, won_after = (np.full(shape, np.nan) for _ in range(4))
    moves, first_after = (np.full((*shape[:2], len(both)), np.nan) for _ in range(2))
    first_before = np.array([[_first(before, observed, pair) for pair in both] for before in base])
    for row, (target, after) in enumerate(edited.items()):
        for number, (before, now) in enumerate(zip(base, after, strict=True)):
            for column, seen in enumerate(observed):
                weights = contrast(list(before), seen, () if seen == target else (target,))
                if weights is None:
                    continue
                margin = _dot(weights, now.values()) - _dot(weights, before.values())
                rivals = [key for key, weight in zip(before, weights, strict=True) if weight < 0]
                here = number, row, column
                shifts[here], faced[here] = sign * margin, len(rivals)
                won_before[here] = sum(_likelier(before[seen], before[rival]) for rival in rivals)
                won_after[here] = sum(_likelier(now[seen], now[rival]) for rival in rivals)
            moved = [sign * (now[seen] - before[seen]) if seen in before else math.nan for seen in observed]
            moves[number, row] = [moved[first] - moved[second] for first, second in both]
            first_after[number, row] = [_first(now, observed, pair) for pair in both]
    first_before = first_before.reshape(len(base), len(both))
    return Tables(
        list(edited), list(observed), sign, shifts, faced, won_before, won_after, moves, first_before, first_after
    )


def _dot(weights: Sequence[float], log_probs: Any) -> float:
    return sum(weight * log_prob for weight, log_prob in zip(weights, log_probs, strict=True))


def _likelier(one: float, other: float) -> float:
    return 1.0 if one > other else 0.5 if one == other else 0.0


def _first(log_probs: Mapping[str, float], observed: Sequence[str], pair: tuple[int, int]) -> float:
    first, second = (observed[column] for column in pair)
    return _likelier(log_probs[first], log_probs[second]) if {first, second} <= log_probs.keys() else math.nan


def draws(items: int, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weights of bootstrap samples.

    Args:
        items (`int`): How many scenarios (or texts) there are, n.
        count (`int`): How many samples.
        seed (`int`): The same seed draws the same samples.

    Returns:
        `np.ndarray`: Float64 `[count + 1, n]`; the first row is what was measured, each item once.

    Example:

    ```py
    >>> from neva_hf.evaluation.tables import draws
    >>> draws(3, count=1)[0].tolist(), int(draws(3, count=1)[1].sum())
    ([1.0, 1.0, 1.0], 3)
    ```
    """
    drawn = np.random.default_rng(seed).multinomial(items, [1 / items] * items, size=count)
    return np.concatenate([np.ones((1, items)), drawn])


def weighted_sum(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums over items, `[B, ...]`, of what is not NaN."""
    return np.tensordot(weights, np.nan_to_num(table), 1)


def weighted(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Means over items, `[B, ...]`, of what is not NaN; NaN where nothing is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return weighted_sum(weights, table) / np.tensordot(weights, (~np.isnan(table)).astype(float), 1)


def present_mean(table: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN; NaN where nothing is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(table, axis=axis) / (~np.isnan(table)).sum(axis=axis)


def over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, infinite where the whole is not positive (nothing was won, so what leaks is out of proportion)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.where(np.isnan(part) | np.isnan(whole), np.nan, np.inf))


def interval(found: np.ndarray) -> Interval:
    """The estimate and its 95% interval: the 2.5th and 97.5th percentile of the bootstrap samples.

    Args:
        found (`np.ndarray`): A statistic `[B]`, the estimate first. Samples in which there was nothing to measure (NaN) do
            not count; infinite ones do.

    Returns:
        `list[float | None]`: `[estimate, low, high]`, with `None` for what is not a finite number.

    Example:

    ```py
    >>> import numpy as np
    >>> from neva_hf.evaluation.tables import interval
    >>> interval(np.array([2.0, 1.0, 3.0]))
    [2.0, 1.05, 2.95]
    ```
    """
    there = found[1:][~np.isnan(found[1:])]
    # (between infinities there is nothing to interpolate)
    method: Any = "linear" if np.isfinite(there).all() else "nearest"
    ends = np.percentile(there, [2.5, 97.5], method=method) if len(there) else [math.nan, math.nan]
    return [plain(number) for number in (found[0], *ends)]


def plain(number: Any) -> float | None:
    """A number for JSON: `None` where it is not finite."""
    return float(number) if np.isfinite(number) else None
