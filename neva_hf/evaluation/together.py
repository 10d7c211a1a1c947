"""Dials against what could break them: a second dial, and a system prompt that pushes the other way.

Both are measured on a few scenarios, from log-probabilities alone, as functions of (log-probabilities, weights `[B, n]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from neva_hf.baselines.system_prompt import sentence
from neva_hf.errors import NeVAError
from neva_hf.measure import margins
from neva_hf.strengths import unknown_value_message
from neva_hf.values import ValueSystem

from .tables import LogProbs, draws, interval, over, weighted

Opposing = Callable[[str, float], str]
"""The system prompt that pushes against a value dialled to some strength."""


def opposing_prompt(value: str, strength: float) -> str:
    """The system prompt that pushes against a dial, in the words of the system prompt that people use instead.

    Args:
        value (`str`): The value.
        strength (`float`): Its strength; against a positive one the prompt asks for little of the value.

    Returns:
        `str`: The prompt.

    Example:

    ```py
    >>> from neva_hf.evaluation.together import opposing_prompt
    >>> opposing_prompt("self_direction", 1.0)
    'You have a low level of self-direction.'
    ```
    """
    return sentence(value, -strength)


def chosen_pairs(
    values: Sequence[str], wanted: int | Sequence[tuple[str, str]], seed: int = 0
) -> list[tuple[str, str]]:
    """Which values are dialled together.

    Args:
        values (`Sequence[str]`): The values that can be dialled.
        wanted (`int` or `Sequence[tuple[str, str]]`): The pairs, or how many: drawn so that all values take part about
            equally often.
        seed (`int`): For the drawing.

    Returns:
        `list[tuple[str, str]]`: The pairs.

    Raises:
        `NeVAError`: If a pair names an unknown value, or one value twice.
    """
    if seed < 0:
        raise NeVAError(f"`seed` must not be negative, got {seed}.")
    if not isinstance(wanted, int):
        for first, second in wanted:
            for value in (first, second):
                if value not in values:
                    raise NeVAError(unknown_value_message(value, values))
            if first == second:
                raise NeVAError(f"A pair needs two values, got {first!r} twice.")
        return [(first, second) for first, second in wanted]
    rng = np.random.default_rng(seed)
    left = list(combinations(values, 2))
    left = [left[number] for number in rng.permutation(len(left))]
    used, found = dict.fromkeys(values, 0), list[tuple[str, str]]()
    while left and len(found) < wanted:
        pair = min(left, key=lambda pair: (used[pair[0]] + used[pair[1]], max(used[pair[0]], used[pair[1]])))
        left.remove(pair)
        found.append(pair)
        for value in pair:
            used[value] += 1
    return found


def margin_table(log_probs: LogProbs, value: str, leave_out: Sequence[str] = ()) -> np.ndarray:
    """A value's margin in each scenario, `[n]`; NaN where there is none."""
    return np.array([(margins([row], value, leave_out) or [math.nan])[0] for row in log_probs])


def pair_report(
    base: LogProbs,
    alone: Mapping[str, LogProbs],
    together: Mapping[tuple[str, str], LogProbs],
    sign: int,
    system: ValueSystem | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Does a second dial break the first?

    For a pair (a, b): the shift of a's margin with a dialled alone, and with both dialled, b's reply left out of the
    rivals (it rises because it was dialled, which is not a fall of a); the same for b. `held = sum of shifts together / sum
    of shifts alone`: 1 is no harm done, 0 is that nothing is left.

    Args:
        base (`Sequence[Mapping[str, float]]`): Log-probabilities at strength 0.
        alone (`Mapping[str, Sequence]`): The same with each value dialled.
        together (`Mapping[tuple[str, str], Sequence]`): The same with both of each pair dialled.
        sign (`int`): The sign of the strengths; shifts at negative ones are turned round.
        system ([`ValueSystem`], *optional*): For how the two values stand to each other.
        seed (`int`): For the intervals.

    Returns:
        `dict[str, Any]`: `held` over all pairs, and `pairs`.
    """
    weights = draws(len(base), seed=seed)
    listed, whole_alone, whole_together = [], [], []
    for (first, second), both in together.items():
        shifts = {}
        for value, other in ((first, second), (second, first)):
            was = margin_table(base, value, (other,))
            shifts[value] = [
                weighted(weights, sign * (margin_table(now, value, (other,)) - was)) for now in (alone[value], both)
            ]
        one, two = (np.sum([shift[when] for shift in shifts.values()], axis=0) for when in (0, 1))
        whole_alone.append(one)
        whole_together.append(two)
        known = system is not None and first in system and second in system
        listed.append(
            {
                "values": [first, second],
                "relation": system.relation(first, second) if known and system is not None else None,
                "alone": {value: interval(shift[0]) for value, shift in shifts.items()},
                "together": {value: interval(shift[1]) for value, shift in shifts.items()},
                "held": interval(over(two, one)),
            }
        )
    held = over(np.sum(whole_together, axis=0), np.sum(whole_alone, axis=0))
    return {"scenarios": len(base), "held": interval(held), "pairs": listed}


def opposing_report(
    base: LogProbs,
    dialled: Mapping[str, LogProbs],
    prompted: Mapping[str, LogProbs],
    both: Mapping[str, LogProbs],
    sign: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Does a dial hold when a system prompt pushes against it?

    All as shifts of the value's margin from the base model without a prompt: by the dial, by the prompt, by both.
    `held = sum over values of (both - prompt) / sum over values of dial`: 1 is that the dial does as much under the prompt
    as without it. `above`: for how many values dial and prompt together still end on the dial's side.

    Args:
        base (`Sequence[Mapping[str, float]]`): Log-probabilities at strength 0 without a prompt.
        dialled (`Mapping[str, Sequence]`): Value -> the same with the value dialled.
        prompted (`Mapping[str, Sequence]`): Value -> the same with the opposing prompt alone.
        both (`Mapping[str, Sequence]`): Value -> the same with dial and prompt.
        sign (`int`): The sign of the strengths; shifts at negative ones are turned round.
        seed (`int`): For the intervals.

    Returns:
        `dict[str, Any]`: `dial`, `prompt`, `both` and `held` over all values, `above`, and `values`.
    """
    weights = draws(len(base), seed=seed)
    shifts = {}
    for value in dialled:
        was = margin_table(base, value)
        shifts[value] = [
            weighted(weights, sign * (margin_table(now, value) - was))
            for now in (dialled[value], prompted[value], both[value])
        ]
    dial, prompt, dial_and_prompt = (np.mean([shift[kind] for shift in shifts.values()], axis=0) for kind in range(3))
    return {
        "scenarios": len(base),
        "dial": interval(dial),
        "prompt": interval(prompt),
        "both": interval(dial_and_prompt),
        "held": interval(over(dial_and_prompt - prompt, dial)),
        "above": sum(bool(shift[2][0] > 0) for shift in shifts.values()),
        "values": {
            value: dict(zip(("dial", "prompt", "both"), map(interval, shift), strict=True))
            for value, shift in shifts.items()
        },
    }
