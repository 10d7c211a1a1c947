"""The numbers of `map_quality.py`, from log-probabilities of replies: control, leakage, choices, intervals.

Everything is a function of tables over scenarios, so that intervals come from the very formulas that they belong to:
weights `[B, n]` count how often each of n scenarios was drawn (the first row: each once, which is the estimate itself),
and a statistic is one number per row. Rows, values and pairs that a scenario says nothing about are NaN in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neva_hf.measure import margins

LogProbs = Sequence[Mapping[str, float]]
DRAWS = 2000


@dataclass(frozen=True)
class Tables:
    """What one method at one sign does, by scenario. Negative strengths are turned round: a fall counts as a rise.

    Args:
        targets (`list[str]`): The values that were dialled, T of them.
        observed (`list[str]`): The values that were watched, U of them, the targets among them.
        shifts (`np.ndarray`): `[n, T, U]`, the shift of each margin, the target's reply left out for the others.
        moves (`np.ndarray`): `[n, T, P]`, of each pair of observed values the move of the first one's log-probability
            minus the second one's.
    """

    targets: list[str]
    observed: list[str]
    shifts: np.ndarray
    moves: np.ndarray

    @property
    def own(self) -> list[int]:
        """The column of each target."""
        return [self.observed.index(target) for target in self.targets]


def pairs(observed: Sequence[str]) -> list[tuple[int, int]]:
    """Every two of the observed values, as their columns."""
    return [(first, second) for second in range(len(observed)) for first in range(second)]


def tables(base: LogProbs, edited: Mapping[str, LogProbs], observed: Sequence[str], sign: int) -> Tables:
    """Compares log-probabilities at strength `sign` with those at 0.

    Args:
        base (`Sequence[Mapping[str, float]]`): Per scenario, reply key -> nats per token.
        edited (`Mapping[str, Sequence]`): The same for each target.
        observed (`Sequence[str]`): The values to watch.
        sign (`int`): 1 or -1.

    Returns:
        [`Tables`]: By scenario.
    """
    both = pairs(observed)
    shifts = np.full((len(base), len(edited), len(observed)), np.nan)
    moves = np.full((len(base), len(edited), len(both)), np.nan)
    for row, (target, after) in enumerate(edited.items()):
        for number, (before, now) in enumerate(zip(base, after, strict=True)):
            for column, seen in enumerate(observed):
                leave_out = () if seen == target else (target,)
                was = margins([before], seen, leave_out)
                if was:
                    shifts[number, row, column] = sign * (margins([now], seen, leave_out)[0] - was[0])
            moved = [sign * (now[seen] - before[seen]) if seen in before else np.nan for seen in observed]
            moves[number, row] = [moved[first] - moved[second] for first, second in both]
    return Tables(list(edited), list(observed), shifts, moves)


def draws(scenarios: int, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weights of bootstrap samples, `[count + 1, scenarios]`; the first row is what was measured."""
    drawn = np.random.default_rng(seed).multinomial(scenarios, [1 / scenarios] * scenarios, size=count)
    return np.concatenate([np.ones((1, scenarios)), drawn])


def present_mean(table: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN; NaN where nothing is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(table, axis=axis) / (~np.isnan(table)).sum(axis=axis)


def weighted(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Means over scenarios, `[B, ...]`, of what is not NaN."""
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.tensordot(weights, np.nan_to_num(table), 1) / np.tensordot(weights, there.astype(float), 1)


def target_shifts(one: Tables, weights: np.ndarray) -> np.ndarray:
    """The shift of each target's own margin, `[B, T]`."""
    return weighted(weights, one.shifts)[:, range(len(one.targets)), one.own]


def rises(one: Tables, weights: np.ndarray) -> np.ndarray:
    """The positive part of each other value's shift, `[B, T, U]`; NaN for the target itself."""
    found = np.clip(weighted(weights, one.shifts), 0, None)
    found[:, range(len(one.targets)), one.own] = np.nan
    return found


def target(one: Tables, weights: np.ndarray) -> np.ndarray:
    """Control: the mean over targets of the shift of their own margin, `[B]`."""
    return target_shifts(one, weights).mean(1)


def nlr(one: Tables, weights: np.ndarray) -> np.ndarray:
    """Leakage: mean over other values of their rise, over the target's; sums over targets are divided, `[B]`."""
    return present_mean(rises(one, weights), 2).sum(1) / target_shifts(one, weights).sum(1)


def own_over_other(one: Tables, weights: np.ndarray) -> np.ndarray:
    """How far choices between two values move where the target takes part, over how far they move elsewhere, `[B]`."""
    own, other = choices(one, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return own / other


def choices(one: Tables, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choices between every two values, as `[B]` each.

    Own: the mean move towards the target, over the pairs that it takes part in. Other: the mean absolute move, over the
    pairs that it does not (of the mean over scenarios, so that what differs from scenario to scenario cancels).
    """
    means = weighted(weights, one.moves)
    own, other = [], []
    for row, column in enumerate(one.own):
        for place, (first, second) in enumerate(pairs(one.observed)):
            if column in (first, second):
                own.append(means[:, row, place] * (1 if column == first else -1))
            else:
                other.append(np.abs(means[:, row, place]))
    nothing = np.full((1, len(weights)), np.nan)
    return present_mean(np.array(own or nothing), 0), present_mean(np.array(other or nothing), 0)


def interval(found: np.ndarray) -> list[float]:
    """The estimate, and the ends of its 95% interval (over the draws in which there is something to measure)."""
    there = found[1:][~np.isnan(found[1:])]
    ends = np.percentile(there, [2.5, 97.5]) if len(there) else [np.nan, np.nan]
    return [float(found[0]), *map(float, ends)]


STATISTICS: dict[str, Callable[[Tables, np.ndarray], np.ndarray]] = {
    "target": target,
    "nlr": nlr,
    "own_over_other": own_over_other,
}


def summary(
    one: Tables, weights: np.ndarray, forms: Sequence[str], neighbours: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    """All that is reported of one method at one sign.

    Args:
        one ([`Tables`]): Its tables.
        weights (`np.ndarray`): From [`draws`].
        forms (`Sequence[str]`): The form of each scenario.
        neighbours (`Mapping[str, Sequence[str]]`): The values next to each target on the circle; empty without one.

    Returns:
        `dict`: Statistics with their intervals as `[estimate, low, high]`, and numbers per value.
    """
    shifts, each = weighted(weights[:1], one.shifts)[0], target_shifts(one, weights)
    up = rises(one, weights[:1])[0]
    leaks = present_mean(up, 1)
    own, other = choices(one, weights)
    next_to = [[seen in neighbours.get(value, ()) for seen in one.observed] for value in one.targets]
    forward = each[0] > 0
    values = {}
    for row, value in enumerate(one.targets):
        most = int(np.nanargmax(up[row]))
        values[value] = {
            "target": interval(each[:, row]),
            "nlr": float(leaks[row] / each[0, row]) if forward[row] else None,
            "largest_leak": float(up[row, most]),
            "largest_leak_at": one.observed[most],
        }
    kinds = {
        form: np.array([1.0 if other_form == form else 0.0 for other_form in forms])[None]
        for form in dict.fromkeys(forms)
    }
    return {
        **{name: interval(statistic(one, weights)) for name, statistic in STATISTICS.items()},
        "right_direction": int(forward.sum()),
        "nlr_mean_of_ratios": float(np.mean(leaks[forward] / each[0][forward])) if forward.any() else None,
        "neighbours_share": float(np.nansum(up * next_to) / np.nansum(up)) if neighbours and np.nansum(up) else None,
        "own": interval(own),
        "other": interval(other),
        "forms": {form: float(target(one, kind)[0]) for form, kind in kinds.items()},
        "values": values,
        "shifts": [[None if np.isnan(cell) else float(cell) for cell in line] for line in shifts],
    }


def ratios(one: Tables, over: Tables, weights: np.ndarray) -> dict[str, list[float]]:
    """Each statistic of one method over that of another, with paired intervals: both see the same drawn scenarios."""
    return {
        name: interval(statistic(one, weights) / statistic(over, weights)) for name, statistic in STATISTICS.items()
    }
