"""One question at several strengths of one dial, in one batch; and the blind test."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing

from neva_hf.errors import NeVAError

from .engine import Engine
from .rows import Rows, Sampling


def five(engine: Engine, value: str) -> list[float]:
    """Five strengths over the fluent range of a value, with 0 in the middle.

    Args:
        engine ([`Engine`]): The page's model.
        value (`str`): The value.

    Returns:
        `list[float]`: Ascending. A value that is fluent on one side alone still has five.
    """
    if value not in engine.ranges:
        raise NeVAError("Choose a value for the sweep.")
    low, high = engine.ranges[value]
    return [round(strength, 2) + 0.0 for strength in (low, low / 2, 0.0, high / 2, high)]


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
    others: Mapping[str, float] | None = None,
) -> Iterator[list[str]]:
    """One answer per strength of a dial, while they grow. Closing the iterator stops the model.

    Args:
        engine ([`Engine`]): The page's model.
        question (`str`): What is asked.
        value (`str`): Which dial.
        strengths (`Sequence[float]`): Its settings.
        seed (`int`): For sampling; all rows draw the same numbers.
        max_new_tokens (`int`): The longest answer.
        temperature (`float`): 0 for the likeliest words.
        gate (`bool`): Whether gates are used, where the map has them.
        others (`dict[str, float]`, *optional*): How the other dials stand.

    Returns:
        `Iterator[list[str]]`: One text per strength.

    Raises:
        `NeVAError`: As for [`Engine.stream`].
    """
    dials = [{**(others or {}), value: strength} for strength in strengths]
    histories: list[list[tuple[str, str]]] = [[] for _ in dials]
    return _texts(engine.rows(histories, question, dials, Sampling(seed, max_new_tokens, temperature), gate=gate))


def blind(seed: int) -> bool:
    """Which answer of a blind test is the edited one: as good as a coin, and the same for the same seed.

    Args:
        seed (`int`): Of the test. Whoever takes it should not choose it.

    Returns:
        `bool`: Whether the first answer is the edited one.
    """
    return random.Random(f"blind test {seed}").random() < 0.5


def _texts(rows: Generator[Rows, None, None]) -> Iterator[list[str]]:
    with closing(rows):
        for found in rows:
            yield found.texts
