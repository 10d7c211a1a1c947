"""Calibration: what strength 1 means.

Strength 1 is where the mean KL divergence from the base model on neutral text reaches a set number of nats per token
(DESIGN section 6), for every value and sign alike: so strengths mean the same for all values, models and methods, and
methods can be compared at equal damage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.dial import active_configs, neva_layers
from neva_hf.errors import NeVAError
from neva_hf.measure import Damage, Item, Progress, damage, no_progress

from .parallel import gathered, share

TARGET_KL = 0.05
# Beyond it answers of small models begin to repeat themselves (a rule of thumb: `neva evaluate --answers` measures it).
FLUENT_KL = 0.12
MAX_STRENGTH = 5.0

# A rough search on a few texts, then a fine one on more: (texts, rounds, tolerance of the coefficient).
_ROUGH, _FINE = (3, 7, 0.2), (8, 4, 0.03)
_PROBED_STRENGTHS = (2.0, 4.0)


@dataclass(frozen=True)
class Calibration:
    """What calibration found. One entry per value: `[negative side, positive side]`.

    Args:
        units (`dict[str, list[float]]`): The coefficient of strengths -1 and +1.
        ranges (`dict[str, list[float]]`): The lowest and the highest strength that is still fluent.
        measured (`dict[str, Any]`): KL divergence and perplexity over the base's, at -1 and +1.
    """

    units: dict[str, list[float]]
    ranges: dict[str, list[float]]
    measured: dict[str, Any]


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    target_kl: float = TARGET_KL,
    progress: Progress[str] = no_progress,
) -> Calibration:
    """Finds the units of a model's active neuron map, and puts them in force.

    All values and both signs are searched at once, as rows of one batch. KL grows about with the square of an edit, so
    each round multiplies a coefficient by the root of what is missing.

    Args:
        model (`nn.Module`): A model with one active NeVA adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts; 8 of them are used (see [`spread`]).
        target_kl (`float`): Mean KL divergence at strength 1, nats per token.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`Calibration`]: What was found. It is written into the adapter's config, too.

    Raises:
        `NeVAError`: If an edit changes nothing at all, or no coefficient was found that gives the wanted divergence.
    """
    check_target_kl(target_kl)
    (config,) = active_configs(model).values()
    ends = [(value, sign) for value in config.values for sign in (-1, 1)]
    units = {value: [1.0, 1.0] for value in config.values}
    config.units, config.ranges = units, {}
    rows = [{value: float(sign)} for value, sign in ends]
    found: list[Damage] = []
    for count, rounds, tolerance in (_ROUGH, _FINE):
        for last in [False] * rounds + [True]:
            # What is measured last is what holds: no coefficient changes after it.
            found = _damage(model, tokenizer, spread(texts, count), rows, progress)
            factors = [_factor(one.kl, target_kl, value) for one, (value, _) in zip(found, ends, strict=True)]
            if last or all(abs(factor - 1) <= tolerance for factor in factors):
                break
            for factor, (value, sign) in zip(factors, ends, strict=True):
                units[value][sign > 0] *= factor
    _check_reached(found, ends, target_kl)
    at_one = [one.kl for one in found]
    config.ranges = _fluent_ranges(model, tokenizer, spread(texts, _ROUGH[0]), ends, at_one, progress)
    for layer in neva_layers(model):
        layer.refresh()
    measured: dict[str, Any] = {value: {} for value in config.values}
    for one, (value, sign) in zip(found, ends, strict=True):
        measured[value][f"{sign:+d}"] = {"kl": one.kl, "perplexity_ratio": one.perplexity_ratio}
    return Calibration(units=units, ranges=config.ranges, measured=measured)


def spread(texts: Sequence[Item], count: int) -> list[Item]:
    """So many texts, evenly over all of them: the shipped ones are sorted by kind.

    Args:
        texts (`Sequence`): The texts, or scenarios.
        count (`int`): How many.

    Returns:
        `list`: All of them, if there are no more than `count`.

    Example:

    ```py
    >>> from neva_hf.identify.calibrate import spread
    >>> spread(["a", "b", "c", "d", "e", "f"], 3)
    ['a', 'c', 'e']
    ```
    """
    count = min(count, len(texts))
    return [texts[place * len(texts) // count] for place in range(count)]


def check_target_kl(target_kl: float) -> None:
    """Raises a [`NeVAError`] if a divergence cannot be calibrated for."""
    if not 0 < target_kl < 5:
        raise NeVAError(f"`target_kl` must be between 0 and 5 nats per token, got {target_kl}.")


def _damage(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rows: Sequence[dict[str, float]],
    progress: Progress[str],
) -> list[Damage]:
    """[`damage`], of which processes share the rows."""
    return gathered(damage(model, tokenizer, texts, share(rows), progress=progress))


def _check_reached(found: Sequence[Damage], ends: Sequence[tuple[str, int]], target_kl: float) -> None:
    for one, (value, sign) in zip(found, ends, strict=True):
        if one.kl < 1e-9:
            raise NeVAError(f"The edit of {value!r} changes nothing of what the model says, however strong it is.")
        if not 0.5 < one.kl / target_kl < 2:
            raise NeVAError(
                f"No strength of {value!r} was found that costs {target_kl:g} nats per token: the last one tried on "
                f"the {'positive' if sign > 0 else 'negative'} side costs {one.kl:.3g}. Choose another `target_kl`, "
                "or more neurons."
            )


def _factor(kl: float, target: float, value: str) -> float:
    """What to multiply a coefficient with; bounded, since far from the target KL is not quadratic."""
    if not math.isfinite(kl):
        raise NeVAError(f"The edit of {value!r} gives no finite KL divergence: its shifts are too large.")
    if kl < 1e-9:
        return 8.0
    return min(max(math.sqrt(target / kl), 1 / 8), 8.0)


def _fluent_ranges(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ends: Sequence[tuple[str, int]],
    at_one: Sequence[float],
    progress: Progress[str],
) -> dict[str, list[float]]:
    """The strengths at which KL reaches `FLUENT_KL`, between probed ones on a line in log-log, down to a tenth."""
    rows = [{value: sign * strength} for strength in _PROBED_STRENGTHS for value, sign in ends]
    found = _damage(model, tokenizer, texts, rows, progress)
    points = (1.0, *_PROBED_STRENGTHS)
    ranges: dict[str, list[float]] = {value: [0.0, 0.0] for value, _ in ends}
    for number, (value, sign) in enumerate(ends):
        # (a divergence that is infinite or no number is that of a broken model)
        kls = [max(one.kl, 1e-9) if math.isfinite(one.kl) else 1e9 for one in found[number :: len(ends)]]
        kls.insert(0, at_one[number])
        low = 1 if kls[1] < FLUENT_KL else 0
        slope = max(math.log(kls[low + 1] / kls[low]) / math.log(points[low + 1] / points[low]), 0.5)
        reach = points[low] * (FLUENT_KL / kls[low]) ** (1 / slope)
        ranges[value][sign > 0] = sign * math.floor(min(reach, MAX_STRENGTH) * 10) / 10
    return ranges
