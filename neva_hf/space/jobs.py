"""What runs where the GPU is: answers, sweeps and the look at one neuron.

On ZeroGPU each of these functions runs in a process of its own, forked from this one. So whatever differs from call to
call is an argument, what comes back can be pickled, and a refusal comes back as a value: of an exception only the name
would arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from neva_hf.errors import NeVAError

from . import insight
from . import sweep as sweeping
from .engine import Engine
from .insight import NeuronFacts
from .turn import Turn

Decorator = Callable[..., Any]
"""Like `spaces.GPU`: takes a function and `duration`, a number or a function of the same arguments."""

_START, _TOKENS_A_SECOND = 6, 15
_T = TypeVar("_T")


@dataclass(frozen=True)
class Refusal:
    """A `NeVAError` on its way between processes."""

    sentence: str


@dataclass(frozen=True)
class Sampled:
    """How an answer is made: seed, longest answer, temperature, and whether gates are used."""

    seed: int = 0
    max_new_tokens: int = 120
    temperature: float = 0.0
    gate: bool = False


def no_gpu(function: Callable[..., Any], duration: Any = None) -> Callable[..., Any]:
    """The decorator where no GPU has to be asked for."""
    return function


def seconds(map_id: str, how: Sampled, *rest: Any) -> int:
    """How long a GPU is asked for: a short one gets its turn sooner.

    Args:
        map_id (`str`): The map.
        how ([`Sampled`]): How answers are made.
        rest (`Any`): What does not matter here.

    Returns:
        `int`: Seconds, from 7 to 30.

    Example:

    ```py
    >>> seconds("", Sampled(max_new_tokens=120))
    14
    ```
    """
    # (what a visitor sends is checked later, where it is used)
    tokens = how.max_new_tokens if isinstance(how.max_new_tokens, (int, float)) else 0
    return int(min(30, _START + max(1, tokens / _TOKENS_A_SECOND)))


class Jobs:
    """The page's work on the model. A map is named by its repository; `""` is the page's own.

    Args:
        engine ([`Engine`]): The page's model.
        gpu (`Callable`): `spaces.GPU`, or [`no_gpu`].
    """

    def __init__(self, engine: Engine, gpu: Decorator = no_gpu) -> None:
        def answer(
            map_id: str, how: Sampled, history: Sequence[Any], question: str, dials: Mapping[str, float]
        ) -> Iterator[Turn | Refusal]:
            try:
                yield from engine.for_map(map_id).stream(history, question, dials, **vars(how))
            except NeVAError as error:
                yield Refusal(str(error))

        def sweep(
            map_id: str, how: Sampled, question: str, value: str, strengths: Sequence[float]
        ) -> Iterator[list[str] | Refusal]:
            try:
                yield from sweeping.stream(engine.for_map(map_id), question, value, strengths, **vars(how))
            except NeVAError as error:
                yield Refusal(str(error))

        def look(map_id: str, module: str, index: int) -> NeuronFacts | Refusal:
            try:
                return insight.neuron(engine.for_map(map_id), module, index)
            except NeVAError as error:
                return Refusal(str(error))

        self._answer = gpu(answer, duration=seconds)
        self._sweep = gpu(sweep, duration=seconds)
        self._look = gpu(look, duration=10)

    def answers(
        self, map_id: str, how: Sampled, history: Sequence[Any], question: str, dials: Mapping[str, float]
    ) -> Generator[Turn, None, None]:
        """Both answers while they grow. See [`Engine.stream`].

        Args:
            map_id (`str`): The map.
            how ([`Sampled`]): How answers are made.
            history (`Sequence`): The conversation so far.
            question (`str`): What is asked.
            dials (`dict[str, float]`): The dials.

        Raises:
            `NeVAError`: For what may not be asked.
        """
        return _refused(self._answer(map_id, how, list(history), question, dict(dials)))

    def sweep(
        self, map_id: str, how: Sampled, question: str, value: str, strengths: Sequence[float]
    ) -> Generator[list[str], None, None]:
        """One answer per strength while they grow. See [`sweep.stream`].

        Raises:
            `NeVAError`: For what may not be asked.
        """
        return _refused(self._sweep(map_id, how, question, value, list(strengths)))

    def look(self, map_id: str, module: str, index: int) -> NeuronFacts:
        """One neuron. See [`insight.neuron`].

        Raises:
            `NeVAError`: If the map does not edit it.
        """
        found = self._look(map_id, module, index)
        if isinstance(found, Refusal):
            raise NeVAError(found.sentence)
        return found


def _refused(found: Generator[_T | Refusal, None, None]) -> Generator[_T, None, None]:
    """Whoever closes this closes what it reads from, so that the model stops."""
    with closing(found):
        for one in found:
            if isinstance(one, Refusal):
                raise NeVAError(one.sentence)
            yield one
