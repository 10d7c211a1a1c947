"""A conversation with two sides, and both answers to its next question."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from neva_hf.errors import NeVAError

from .rows import Rows


class Exchange(NamedTuple):
    """A question and what both sides answered.

    Args:
        question (`str`): What was asked.
        base (`str`): What the base model answered; its side goes on with this.
        edited (`str`): What the edited one answered.
    """

    question: str
    base: str
    edited: str


@dataclass(frozen=True)
class Turn:
    """Both answers so far.

    Args:
        base (`str`): The base model's.
        edited (`str`): The edited one's.
        done (`bool`): Whether this is all.
        tokens (`int`): How many tokens the longer one has.
        note (`str`): A sentence, if they ended before their end.
    """

    base: str
    edited: str
    done: bool
    tokens: int
    note: str = ""


def sides(history: Any) -> list[list[tuple[str, str]]]:
    """A conversation as the base model's side of it saw it, and as the edited one's.

    Args:
        history (`Sequence[Exchange]`): The conversation, or what should be one.

    Returns:
        `list[list[tuple[str, str]]]`: Questions and answers of both sides.

    Raises:
        `NeVAError`: If it is none.
    """
    listed = isinstance(history, Sequence) and not isinstance(history, str)
    if not listed or not all(isinstance(one, (list, tuple)) and len(one) == 3 for one in history):
        raise NeVAError("The conversation must be a list of [question, base answer, edited answer].")
    exchanges = [Exchange(*one) for one in history]
    return [[(one.question, one.base) for one in exchanges], [(one.question, one.edited) for one in exchanges]]


def as_turns(rows: Generator[Rows, None, None]) -> Iterator[Turn]:
    """Two rows as turns. Closing the turns closes the rows."""
    with closing(rows):
        for found in rows:
            yield Turn(found.texts[0], found.texts[1], found.done, found.tokens, found.note)
