"""From the tables of one method at one strength to the numbers of a report, each `[estimate, low, high]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neva_hf.values import ValueSystem

from . import control, leakage
from .tables import Interval, Tables, draws, interval, over, pairs_of, plain


def summary(
    one: Tables, weights: np.ndarray, system: ValueSystem | None = None, forms: Sequence[str] = ()
) -> dict[str, Any]:
    """All that is reported of what a method does to values at one strength.

    Args:
        one ([`Tables`]): Its tables.
        weights (`np.ndarray`): From [`draws`], `[B, n]`.
        system ([`ValueSystem`], *optional*): Groups and circle; without them what needs them is left out.
        forms (`Sequence[str]`): The form of each scenario's question.

    Returns:
        `dict[str, Any]`: Plain data. Numbers over all targets and, in `values`, of each; the matrices `shifts` and
        `csr_shifts` `[T][U]`, `shifts_95` `[T][U][2]`, and `choices`: the share of scenarios in which the
        first of two values wins.
    """
    related = leakage.relations(one, system)
    shifts, columns = leakage.margin_shifts(one, weights), range(len(one.observed))
    own, other = control.choice_moves(one, weights)
    before, after = control.csr(one, weights)
    known = {kind for row in related for kind in row}
    groups = [kind for kind in leakage.RELATIONS if kind in known]
    circle = system if system is not None and system.has_circle and all(t in system for t in one.targets) else None
    near = [list(circle.neighbours(target)) for target in one.targets] if circle is not None else []
    found: dict[str, Any] = {
        "target": interval(control.target(one, weights)),
        "right_direction": int((control.target_shifts(one, weights[:1])[0] > 0).sum()),
        "csr_before": interval(before),
        "csr": interval(after),
        "csr_change": interval(control.csr_change(one, weights)),
        "nlr": interval(leakage.nlr(one, weights)),
        "nlr_csr": interval(leakage.nlr_csr(one, weights)),
        "nglr": _grouped(one, weights, related, groups, leakage.margin_shifts),
        "nglr_csr": _grouped(one, weights, related, groups, control.csr_shifts),
        "neighbours_share": interval(leakage.neighbours_share(one, weights, near)) if near else None,
        "own": interval(own),
        "other": interval(other),
        "own_over_other": interval(control.own_over_other(one, weights)),
        "forms": _by_form(one, forms),
        "values": _by_value(one, weights),
        "shifts": _matrix(shifts[0]),
        "shifts_95": [[interval(shifts[:, row, column])[1:] for column in columns] for row in range(len(one.targets))],
        "csr_shifts": _matrix(control.csr_shifts(one, weights[:1])[0]),
    }
    first_before, first_after = control.choice_shares(one, weights[:1])
    found["choices"] = {
        "pairs": [[one.observed[first], one.observed[second]] for first, second in pairs_of(one.observed)],
        "before": [plain(share) for share in first_before[0]],
        "after": {target: [plain(share) for share in first_after[0, row]] for row, target in enumerate(one.targets)},
    }
    return found


def _grouped(
    one: Tables, weights: np.ndarray, related: list[list[str]], groups: list[str], shifts: leakage.Shifts
) -> dict[str, Interval] | None:
    if not groups:
        return None
    found = {"all": interval(leakage.nglr(one, weights, related, groups, shifts))}
    return found | {kind: interval(leakage.nglr(one, weights, related, [kind], shifts)) for kind in groups}


def _by_form(one: Tables, forms: Sequence[str]) -> dict[str, float | None]:
    kinds = {
        kind: np.array([[1.0 if form == kind else 0.0 for form in forms]]) for kind in dict.fromkeys(forms) if kind
    }
    return {kind: plain(control.target(one, weights)[0]) for kind, weights in kinds.items()}


def _by_value(one: Tables, weights: np.ndarray) -> dict[str, Any]:
    shifts = control.target_shifts(one, weights)
    before, after = control.success_rates(one, weights)
    changes = control.csr_shifts(one, weights)
    _, up = leakage.rises(one, weights)
    found = {}
    for row, (value, column) in enumerate(zip(one.targets, one.own, strict=True)):
        most = int(np.nanargmax(up[0, row])) if not np.isnan(up[0, row]).all() else None
        with np.errstate(invalid="ignore", divide="ignore"):
            leak = np.nansum(up[:, row], axis=1) / (~np.isnan(up[:, row])).sum(1)
        found[value] = {
            "target": interval(shifts[:, row]),
            "csr_before": interval(before[:, row, column]),
            "csr": interval(after[:, row, column]),
            "csr_change": interval(changes[:, row, column]),
            "nlr": interval(over(leak, shifts[:, row])),
            "largest_leak": None if most is None else plain(up[0, row, most]),
            "largest_leak_at": None if most is None or up[0, row, most] == 0 else one.observed[most],
        }
    return found


def _matrix(table: np.ndarray) -> list[list[float | None]]:
    return [[plain(cell) for cell in line] for line in table]


def spent(found: Mapping[str, Any], values: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """KL divergence and perplexity over the base model's, over all values and of each; intervals over texts.

    `KL = sum over texts of KL / tokens`, nats per token; `perplexity ratio = exp(loss beyond the base model's / tokens)`.
    Over all values: the mean of the values' own.

    Args:
        found (`Mapping[str, Any]`): From [`steered_damage`], one setting per value.
        values (`Sequence[str]`): The values.
        seed (`int`): For the intervals.

    Returns:
        `dict[str, Any]`: `kl`, `perplexity_ratio`, `tokens`, `texts`, and `values`.
    """
    tokens = np.array(found["tokens"], dtype=float)
    weights = draws(len(tokens), seed=seed)
    whole = weights @ tokens
    kl = np.array(found["kl"]) @ weights.T / whole
    gaps = np.array(found["loss"]) @ weights.T / whole
    ratio = np.exp(np.minimum(gaps, 700.0))
    return {
        "tokens": int(tokens.sum()),
        "texts": len(tokens),
        "kl": interval(kl.mean(0)),
        "perplexity_ratio": interval(ratio.mean(0)),
        "values": {
            value: {"kl": interval(kl[row]), "perplexity_ratio": interval(ratio[row])}
            for row, value in enumerate(values)
        },
    }


PAIRED = {
    "target": control.target,
    "csr_change": control.csr_change,
    "nlr": leakage.nlr,
    "own_over_other": control.own_over_other,
}
"""What methods are compared by, with one number for all targets each."""


def beside(one: Tables, other: Tables, weights: np.ndarray) -> dict[str, dict[str, Interval]]:
    """One method beside another, with paired intervals: both see the same drawn scenarios.

    Args:
        one ([`Tables`]): The first method.
        other ([`Tables`]): The other one, on the same scenarios.
        weights (`np.ndarray`): `[B, n]`.

    Returns:
        `dict[str, dict[str, Interval]]`: For each number `minus`, the first method's minus the other's, and `times`, the
        first method's over the other's (not defined where the other's is not positive).
    """
    found = {}
    for name, statistic in PAIRED.items():
        mine, theirs = statistic(one, weights), statistic(other, weights)
        with np.errstate(invalid="ignore"):
            found[name] = {"minus": interval(mine - theirs), "times": interval(over(mine, theirs))}
    return found
