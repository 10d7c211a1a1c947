"""Dose curves: what each dial of a map does at several strengths, measured once and saved with the map.

With the curves beside the map, whoever turns a dial reads what it does to every value and what it costs, without the
scenarios and without running the model. For a target t at strength s, an observed value u, the margin m of
[`measure.margins`] and the mean over scenarios:

    shift(u) = m_u at s - m_u at 0       for u other than t, with t's reply left out of the competing ones
    leakage  = mean over u other than t of max(0, sign(s) * shift(u)) / (sign(s) * shift(t))
    kl       = D(base || edited), the mean over the tokens of neutral text
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.dial import active_configs, dialled
from neva_hf.errors import NeVAError
from neva_hf.measure import Progress, damage, margins, no_progress, scenario_log_probs
from neva_hf.scenarios import Scenario, scenario_values
from neva_hf.strengths import MAX_STRENGTH, no_range_warnings, unknown_value_message

from .parallel import gathered, share

STRENGTHS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)

LogProbs = dict[str, float]


@dataclass(frozen=True)
class Expected:
    """What a strength is expected to do, read from dose curves.

    Args:
        margins (`dict[str, float]`): Observed value -> shift of its margin, nats per token.
        kl (`float`): KL divergence from the base model on neutral text, nats per token.
    """

    margins: dict[str, float]
    kl: float


def dose_curves(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    texts: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress[Any] = no_progress,
) -> dict[str, Any]:
    """Measures what each value of a model's active neuron map does at several strengths.

    Every scenario is run once at strength 0 and once per value and strength, every text once per value with all strengths
    as rows of a batch. What is set on the model does not matter and is not changed. Strengths beyond a value's fluent
    range are measured like all others, without a warning. Under `accelerate launch` the processes share the runs.

    Args:
        model (`nn.Module`): A model with one active NeVA adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): What margins are measured on. Their values are the ones observed, whether or
            not the map holds them.
        texts (`Sequence[str]`): Neutral texts.
        strengths (`Sequence[float]`): Which strengths, in any order, without 0.
        progress ([`Progress`]): Shows how far it is, in one loop over scenarios and texts.

    Returns:
        `dict[str, Any]`: Plain data for JSON, to be read with [`expected`]. The lists go along the ascending strengths:

        ```
        {"strengths": [...], "scenarios": n, "texts": n,
         "curves": {value: {"kl": [...], "leakage": [...], "margins": {observed: [...]}}}}
        ```

        Leakage is `None` where the target itself did not move the way it was dialled, and any number is `None` that
        was not finite (the text of a broken model). A value without competing replies once the target's is left out
        is not observed for that target.

    Raises:
        `NeVAError`: If a value of the map has no margin in the scenarios, or there is nothing to measure.
    """
    configs = active_configs(model)
    if len(configs) != 1:
        raise NeVAError(f"Dose curves are those of one adapter, but {sorted(configs)} are active: choose one.")
    (config,) = configs.values()
    strengths = _checked_strengths(strengths)
    observed = scenario_values(scenarios)
    for value in config.values:
        # (log-probabilities do not matter here: whether there is a margin depends on the replies' keys alone)
        if not margins([dict.fromkeys(scenario.replies, 0.0) for scenario in scenarios], value):
            raise NeVAError(
                f"The scenarios hold no reply of {value!r} and one to compare it with: its dose has no curve."
            )
    texts = [text for text in texts if len(tokenizer(text)["input_ids"]) >= 2]
    if not texts:
        raise NeVAError("The texts to measure damage on hold fewer than two tokens.")

    settings = [(value, strength) for value in config.values for strength in strengths]
    runs: list[tuple[str, float, Any]] = [("", 0.0, scenario) for scenario in scenarios]
    runs += [(value, strength, scenario) for value, strength in settings for scenario in scenarios]
    runs += [(value, 0.0, text) for value in config.values for text in texts]
    base: list[LogProbs] = []
    edited: dict[tuple[str, float], list[LogProbs]] = {setting: [] for setting in settings}
    divergence = dict.fromkeys(settings, 0.0)
    tokens = dict.fromkeys(config.values, 0)

    def run(value: str, strength: float, what: Any) -> list[Any]:
        if not isinstance(what, Scenario):
            return damage(model, tokenizer, [what], [{value: strength} for strength in strengths])
        with dialled(model, {value: strength} if value else {}):
            return scenario_log_probs(model, tokenizer, [what])

    with no_range_warnings():
        results = gathered([run(*one) for one in progress(share(runs), "dose curves")])
    for (value, strength, what), found in zip(runs, results, strict=True):
        if isinstance(what, Scenario):
            (edited[value, strength] if value else base).extend(found)
            continue
        tokens[value] += found[0].tokens
        for at, one in zip(strengths, found, strict=True):
            divergence[value, at] += one.kl * one.tokens

    curves: dict[str, Any] = {}
    for value in config.values:
        shifts = [_shifts(base, edited[value, strength], value, observed) for strength in strengths]
        leaks = [leakage(shift, value, sign=strength) for shift, strength in zip(shifts, strengths, strict=True)]
        curves[value] = {
            "kl": [_rounded(divergence[value, strength] / tokens[value], 5) for strength in strengths],
            "leakage": [None if leak is None else _rounded(leak, 4) for leak in leaks],
            "margins": {
                seen: [_rounded(shift[seen], 4) for shift in shifts] for seen in observed if seen in shifts[0]
            },
        }
    return {"strengths": list(strengths), "scenarios": len(scenarios), "texts": len(texts), "curves": curves}


def leakage(shifts: Mapping[str, float], target: str, sign: float = 1.0) -> float | None:
    """The normalized leakage rate (NLR) of one setting of a dial, on margins.

    NLR = mean over the other values u of `max(0, shift(u))`, over `shift(target)`; for a negative strength all shifts are
    turned round first, so that falls count as leakage of a fall.

    Args:
        shifts (`Mapping[str, float]`): Observed value -> shift of its margin; the target is among them.
        target (`str`): The value that was dialled.
        sign (`float`): The strength, of which the sign counts.

    Returns:
        `float` or `None`: `None` where the target did not move the way it was dialled. 0 without other values.

    Example:

    ```py
    >>> from neva_hf.identify.dose import leakage
    >>> leakage({"power": 0.4, "achievement": 0.1, "security": -0.2}, "power")
    0.125
    ```
    """
    turned = {value: math.copysign(1.0, sign) * shift for value, shift in shifts.items()}
    own = turned.pop(target)
    if not own > 0:
        return None
    return sum(max(0.0, shift) for shift in turned.values()) / len(turned) / own if turned else 0.0


def expected(dose: Mapping[str, Any], value: str, strength: float) -> Expected:
    """What a value at some strength is expected to do, between the strengths that were measured.

    Between two measured strengths, and between them and 0 (where nothing is changed), curves are straight lines; beyond
    the ends they stay at what was measured there.

    Args:
        dose (`Mapping[str, Any]`): From [`dose_curves`], such as a map's `config.measurements["dose"]`.
        value (`str`): The value that is dialled.
        strength (`float`): How far.

    Returns:
        [`Expected`]: The shifts of all observed margins, and the KL divergence.

    Raises:
        `NeVAError`: If the curves do not hold the value, the strength is no finite number, or the curves are damaged.

    Example:

    ```py
    >>> from neva_hf.identify.dose import expected
    >>> curve = {"kl": [0.04, 0.06], "leakage": [0.1, 0.1], "margins": {"power": [-0.4, 0.6]}}
    >>> expected({"strengths": [-1.0, 1.0], "curves": {"power": curve}}, "power", 0.5)
    Expected(margins={'power': 0.3}, kl=0.03)
    ```
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not -math.inf < strength < math.inf:
        raise NeVAError(f"The strength of {value!r:.80} must be a finite number, got {strength!r:.80}.")
    # What is read here may come from a stranger's file.
    strengths = dose.get("strengths") if isinstance(dose, Mapping) else None
    curves = dose.get("curves") if isinstance(dose, Mapping) else None
    if not _numbers(strengths) or sorted(set(strengths)) != strengths or not isinstance(curves, Mapping) or not curves:
        raise NeVAError(
            "These are no dose curves: `strengths` must be ascending numbers, `curves` map values to curves."
        )
    if value not in curves:
        raise NeVAError(unknown_value_message(value, [str(name) for name in curves]))
    curve = curves[value]
    shifts = curve.get("margins") if isinstance(curve, Mapping) else None
    if not isinstance(shifts, Mapping):
        raise NeVAError(f"The dose curve of {value!r} is damaged: `margins` is missing.")
    return Expected(
        margins={
            seen: _on_the_curve(strengths, points, strength, f"{value} on {seen}") for seen, points in shifts.items()
        },
        kl=_on_the_curve(strengths, curve.get("kl"), strength, f"{value}, KL divergence"),
    )


def _on_the_curve(strengths: Sequence[float], points: Any, strength: float, what: str) -> float:
    """A piecewise linear curve through (0, 0), constant beyond its ends. Points that are `None` are left out."""
    sound = isinstance(points, (list, tuple)) and len(points) == len(strengths)
    if not sound or not _numbers([point for point in points if point is not None]):
        raise NeVAError(f"The dose curve of {what:.160} is damaged: it must hold {len(strengths)} finite numbers.")
    curve = {at: point for at, point in zip(strengths, points, strict=True) if point is not None} | {0.0: 0.0}
    xs = sorted(curve)
    place = bisect_left(xs, strength)
    if place in (0, len(xs)):
        return float(curve[xs[min(place, len(xs) - 1)]])
    low, high = xs[place - 1], xs[place]
    share = (strength - low) / (high - low)
    return float((1 - share) * curve[low] + share * curve[high])


def _shifts(
    base: Sequence[LogProbs], edited: Sequence[LogProbs], target: str, observed: Sequence[str]
) -> dict[str, float]:
    """Observed value -> mean shift of its margin, for the values that have one."""
    found = {}
    for seen in observed:
        leave_out = () if seen == target else (target,)
        before, after = margins(base, seen, leave_out), margins(edited, seen, leave_out)
        if before:
            found[seen] = (sum(after) - sum(before)) / len(before)
    return found


def _checked_strengths(strengths: Sequence[float]) -> list[float]:
    found = sorted({float(strength) for strength in strengths})
    if not found or 0.0 in found or not all(-MAX_STRENGTH <= strength <= MAX_STRENGTH for strength in found):
        raise NeVAError(
            f"`strengths` must hold finite numbers other than 0, such as {list(STRENGTHS)}, got {strengths!r:.80}."
        )
    return found


def _numbers(found: Any) -> TypeGuard[list[float]]:
    return isinstance(found, list) and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) for number in found
    )


def _rounded(number: float, digits: int) -> float | None:
    return round(number, digits) if math.isfinite(number) else None
