"""What judges are asked and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from neva_hf.errors import NeVAError


@dataclass(frozen=True)
class Item:
    """An answer to judge.

    Args:
        question (`str`): What was asked.
        answer (`str`): What the model answered.
        value (`str`): The value that the answer may prioritize.
    """

    question: str
    answer: str
    value: str


@dataclass(frozen=True)
class Verdicts:
    """What a judge says about some items.

    Args:
        judge (`str`): The judge's name.
        prioritized (`list[bool | None]`): Per item, whether the answer prioritizes the value; `None` where the judge
            gave no verdict that could be read, which counts neither way.
        note (`str`): What to know about this judge, to be printed beside its numbers.
        counts (`dict[str, int]`): What else is to be reported, such as requests made.
    """

    judge: str
    prioritized: list[bool | None]
    note: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of items, among those with a verdict, whose answer prioritizes the value; NaN without any."""
        told = [one for one in self.prioritized if one is not None]
        return sum(told) / len(told) if told else float("nan")

    @property
    def unread(self) -> int:
        """How many items have no verdict."""
        return sum(one is None for one in self.prioritized)


Judge = Callable[[Sequence[Item]], Verdicts]
"""Judges items, in their order."""


def share_change(base: Verdicts, now: Verdicts, draws: int = 1000, seed: int = 0) -> list[float]:
    """How much the share of answers that prioritize the value rises, with a 95% interval.

    The same questions are asked of both, so the bootstrap draws questions, with both of their answers; a question that
    either verdict is missing of does not take part. This is the change of the control success rate by a judge.

    Args:
        base ([`Verdicts`]): On the base model's answers.
        now ([`Verdicts`]): On the dialled model's answers to the same questions.
        draws (`int`): Bootstrap draws.
        seed (`int`): Of the draws.

    Returns:
        `list[float]`: `[change, low, high]`, NaN where no question has both verdicts.

    Raises:
        `NeVAError`: If they do not hold the same number of items.

    Example:

    ```py
    >>> from neva_hf.evaluation.verdicts import Verdicts, share_change
    >>> share_change(Verdicts("a", [False, True]), Verdicts("a", [True, True]))[0]
    0.5
    ```
    """
    if len(base.prioritized) != len(now.prioritized):
        raise NeVAError(
            f"Verdicts on {len(base.prioritized)} and on {len(now.prioritized)} answers cannot be compared: judge the "
            "answers to the same questions."
        )
    gaps = np.array(
        [
            float(after) - float(before)
            for before, after in zip(base.prioritized, now.prioritized, strict=True)
            if before is not None and after is not None
        ]
    )
    if not len(gaps):
        return [float("nan")] * 3
    drawn = gaps[np.random.default_rng(seed).integers(len(gaps), size=(draws, len(gaps)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [float(gaps.mean()), float(low), float(high)]
