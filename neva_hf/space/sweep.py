"""One question at several strengths of one dial, in one batch; and which side of a blind test is the edited one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .engine import Engine


def five(engine: Engine, value: str) -> list[float]:
    """Five strengths across the fluent range, 0 in the middle."""
    low, high = engine.ranges[value]
    return [low, low / 2, 0.0, high / 2, high]


def stream(
    engine: Engine,
    question: str,
    value: str,
    strengths: Sequence[float],
    *,
    seed: int = 0,
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    gate: bool = False,
) -> Iterator[list[str]]:
    """One answer per strength, as they grow."""
    raise NotImplementedError


def blind(seed: int) -> bool:
    """Whether the edited answer is shown first (left) in the blind test of this seed."""
    return bool(seed % 2)
