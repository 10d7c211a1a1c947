"""Calibration of any method: strength +1 and -1 cost the same KL divergence on neutral text, per value and sign.

This is how methods are compared at equal damage (DESIGN section 6), by the texts, the limit of tokens and the stages of the
calibration of neuron maps. That one assumes that KL grows with the square of an edit; methods with gates, clamps or
multipliers do not, so here a coefficient is searched between two that enclose the target, once there are such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.identify.calibrate import TARGET_KL, check_target_kl, spread
from neva_hf.measure import Damage, Progress, no_progress

from .damage import damage_of
from .method import At, Dials, Method

# A rough search on a few texts, then a fine one on more: (texts, rounds, tolerance of the coefficient).
ROUGH, FINE = (3, 7, 0.2), (8, 5, 0.02)
MAX_UNIT = 1e4
# A KL divergence this close to the wanted one, in parts of it, has reached it.
_REACHED = 0.1
_NOTHING = 1e-9

End = tuple[str, int]
"""A value and a sign."""


@dataclass(frozen=True)
class _Tried:
    unit: float
    found: Damage

    @property
    def kl(self) -> float:
        # (a divergence that is infinite or no number is that of a broken model)
        return self.found.kl if math.isfinite(self.found.kl) else 1e9


def calibrated(
    method: Method,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    target_kl: float = TARGET_KL,
    signs: Sequence[int] = (-1, 1),
    phases: Sequence[tuple[int, int, float]] = (ROUGH, FINE),
    start: Mapping[End, float] | None = None,
    progress: Progress[str] = no_progress,
) -> Method:
    """The same method in calibrated strengths.

    All values and signs are searched at once, as rows of one batch.

    Args:
        method ([`Method`]): The method. One that is not `scalable` stays as it is; what it costs goes into its notes.
        model (`nn.Module`): The model that it steers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts; 8 of them are used, evenly spread.
        target_kl (`float`): Mean KL divergence at strengths +1 and -1, nats per token.
        signs (`Sequence[int]`): Which signs to calibrate; the unit of the other one is taken over.
        phases (`Sequence[tuple[int, int, float]]`): Texts, rounds and tolerance of the coefficient of each search.
        start (`Mapping[tuple[str, int], float]`, *optional*): The coefficients to begin with, in place of 1.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`Method`]: Its notes hold `target_kl`, and for each value a pair (strength -1, strength +1) of `units`, `kl` and
        `perplexity_ratio`; `not_reached` says in words where no coefficient gives the wanted divergence, and the
        nearest one was taken.

    Raises:
        `NeVAError`: If the target is no divergence that can be asked for, or the texts hold nothing to measure on.

    Example:

    ```py
    >>> from neva_hf.baselines import METHODS, Evidence, calibrated
    >>> evidence = Evidence(model, tokenizer, ["power"], train, dev, texts)  # doctest: +SKIP
    >>> method = calibrated(METHODS["CAA"](evidence), model, tokenizer, texts)  # doctest: +SKIP
    >>> with method.at([{"power": 1.0}]):  # doctest: +SKIP
    ...     model.generate(**inputs)
    ```
    """
    check_target_kl(target_kl)
    ends: list[End] = [(value, sign) for value in method.values for sign in signs]
    best: dict[End, _Tried] = {}
    if not method.scalable:
        best = _measure(method, model, tokenizer, spread(texts, phases[-1][0]), dict.fromkeys(ends, 1.0), progress)
        return replace(method, notes={**method.notes, **_notes(method, best, target_kl)})
    units = {end: (start or {}).get(end, 1.0) for end in ends}
    for count, rounds, tolerance in phases:
        tried: dict[End, list[_Tried]] = {end: [] for end in ends}
        missing = ends
        for _ in range(rounds + 1):
            found = _measure(
                method, model, tokenizer, spread(texts, count), {end: units[end] for end in missing}, progress
            )
            for end, one in found.items():
                tried[end].append(one)
            missing = [end for end in missing if not _done(tried[end], target_kl, tolerance)]
            if not missing:
                break
            for end in missing:
                units[end] = _next_unit(tried[end], target_kl)
        best = {end: min(points, key=lambda one: abs(_gap(one, target_kl))) for end, points in tried.items()}
        units = {end: one.unit for end, one in best.items()}
    scale = {value: (units[_one_of(units, value, -1)], units[_one_of(units, value, 1)]) for value in method.values}
    return replace(method, at=_scaled(method, scale), notes={**method.notes, **_notes(method, best, target_kl)})


def _measure(
    method: Method,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    units: Mapping[End, float],
    progress: Progress[str],
) -> dict[End, _Tried]:
    rows = [{value: sign * unit} for (value, sign), unit in units.items()]
    found = damage_of(method, model, tokenizer, texts, rows, progress=progress)
    return {end: _Tried(unit, one) for (end, unit), one in zip(units.items(), found, strict=True)}


def _gap(one: _Tried, target: float) -> float:
    return math.log(max(one.kl, _NOTHING) / target)


def _done(points: Sequence[_Tried], target: float, tolerance: float) -> bool:
    """Whether the last coefficient is near enough, or larger and smaller ones change nothing any more."""
    last = points[-1]
    if abs(_gap(last, target)) <= 2 * math.log1p(tolerance):
        return True
    if last.unit in (MAX_UNIT, 1 / MAX_UNIT):
        return True
    if len(points) < 2 or last.kl < _NOTHING:
        return False
    before = points[-2]
    same_side = _gap(before, target) * _gap(last, target) > 0
    moved = abs(math.log(last.unit / before.unit))
    return same_side and moved > 0.5 and abs(_gap(last, target) - _gap(before, target)) < 0.02 * moved


def _next_unit(points: Sequence[_Tried], target: float) -> float:
    """The coefficient to try next: between two that enclose the target, else further on by the square law."""
    above = min((one for one in points if one.kl >= target), key=lambda one: one.unit, default=None)
    under = [one for one in points if one.kl < target and (above is None or one.unit < above.unit)]
    if above is None or not under:
        last = points[-1]
        factor = 8.0 if last.kl < _NOTHING else min(max(math.sqrt(target / last.kl), 1 / 8), 8.0)
        return min(max(last.unit * factor, 1 / MAX_UNIT), MAX_UNIT)
    below = max(under, key=lambda one: one.unit)
    low, high = _gap(below, target), _gap(above, target)
    # (kept off the ends, so that each step makes the interval smaller)
    part = min(max(-low / (high - low), 0.1), 0.9)
    return below.unit * (above.unit / below.unit) ** part


def _scaled(method: Method, units: Mapping[str, tuple[float, float]]) -> At:
    """`method.at` in calibrated strengths."""

    @contextmanager
    def at(rows: Sequence[Dials]) -> Iterator[None]:
        scaled = [{name: s * units.get(name, (1.0, 1.0))[s > 0] for name, s in row.items()} for row in rows]
        with method.at(scaled):
            yield

    return at


def _one_of(found: Mapping[End, object], value: str, sign: int) -> End:
    """The end of that sign, or the other one where only that was searched."""
    return (value, sign) if (value, sign) in found else (value, -sign)


def _notes(method: Method, best: Mapping[End, _Tried], target: float) -> dict[str, object]:
    pairs = {value: [best[_one_of(best, value, sign)] for sign in (-1, 1)] for value in method.values}
    missed = [
        f"{value} {'+' if sign > 0 else '-'}: the nearest to {target:g} is {one.kl:.3g} nats per token"
        + (f", at coefficient {one.unit:.3g}" if method.scalable else "")
        for (value, sign), one in best.items()
        if not 1 - _REACHED <= one.kl / target <= 1 + _REACHED
    ]
    notes: dict[str, object] = {
        "units": {value: [one.unit for one in pair] for value, pair in pairs.items()},
        "kl": {value: [one.found.kl for one in pair] for value, pair in pairs.items()},
        "perplexity_ratio": {value: [one.found.perplexity_ratio for one in pair] for value, pair in pairs.items()},
        "target_kl": target,
    }
    return {**notes, "not_reached": missed} if missed else notes
