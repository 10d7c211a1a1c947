"""What a visitor asks for, checked before anything runs. Every refusal is a sentence for the page."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from neva_hf.errors import NeVAError
from neva_hf.prompts import format_prompt
from neva_hf.strengths import parse_strengths

from .limits import Limits
from .rows import Sampling
from .state import MAX_SEED, Dials

History: TypeAlias = Sequence[tuple[str, str]]
"""Questions and answers of one side."""


def checked_dials(dials: Mapping[str, float], values: Sequence[str], reach: float) -> Dials:
    """The dials that are not at 0.

    Args:
        dials (`dict[str, float]`): Value -> strength.
        values (`Sequence[str]`): The values that there are.
        reach (`float`): How far they may be turned.

    Returns:
        `dict[str, float]`: The same as plain numbers, in the order of the values.

    Raises:
        `NeVAError`: For other values, for what is no number, and beyond the reach.

    Example:

    ```py
    >>> from neva_hf.space.ask import checked_dials
    >>> checked_dials({"power": 1, "security": 0}, ["security", "power"], 4.0)
    {'power': 1.0}
    ```
    """
    if not isinstance(dials, Mapping):
        raise NeVAError("Dials must be given as value and strength, such as {'benevolence': 1.0}.")
    parse_strengths(dials, values)
    for name, strength in dials.items():
        if abs(strength) > reach:
            raise NeVAError(f"The dial of {name} goes from {-reach:g} to {reach:g}, and was set to {strength:g}.")
    return {name: float(dials[name]) for name in values if dials.get(name)}


def checked_sampling(seed: Any, max_new_tokens: Any, temperature: Any, limits: Limits) -> Sampling:
    """How answers are made, within the limits.

    Raises:
        `NeVAError`: For what is no number or beyond its limit.
    """
    seed = _whole("seed", seed, 0, MAX_SEED)
    tokens = _whole("length of the answer", max_new_tokens, 1, limits.new_tokens)
    if not _is_number(temperature) or not 0 <= temperature <= limits.temperature:
        raise NeVAError(f"The temperature must be a number from 0 to {limits.temperature:g}.")
    # (colder than this is greedy, and its logits would overflow)
    return Sampling(seed, tokens, float(temperature) if temperature >= 0.01 else 0.0)


def checked_texts(question: Any, histories: Sequence[History], limits: Limits) -> str:
    """The question, if it and the conversation may be asked.

    Raises:
        `NeVAError`: If the question is empty, or something too long or no text.
    """
    if not isinstance(question, str) or not question.strip():
        raise NeVAError("Type a question first.")
    if len(question) > limits.question_chars:
        raise NeVAError(
            f"The question has {len(question)} characters, and may have {limits.question_chars}. Shorten it."
        )
    for history in histories:
        if not all(isinstance(text, str) for pair in history for text in pair):
            raise NeVAError("The conversation must hold texts alone.")
    if sum(len(text) for history in histories for pair in history for text in pair) > limits.history_chars:
        raise NeVAError("This conversation has become too long for the model. Clear it to go on.")
    return question.strip()


def prompt_ids(tokenizer: Any, question: str, history: History, room: int) -> list[int]:
    """The tokens in front of an answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        question (`str`): From [`checked_texts`].
        history (`Sequence[tuple[str, str]]`): What came before.
        room (`int`): How many tokens they may be.

    Returns:
        `list[int]`: Token ids.

    Raises:
        `NeVAError`: If they are more.
    """
    prompt = format_prompt(tokenizer, question, history=history)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) > room:
        what = "Clear the conversation, or ask" if history else "Ask"
        raise NeVAError(f"This is {len(ids)} tokens for the model, which reads {max(room, 0)} here. {what} for less.")
    return ids


def _whole(what: str, number: Any, low: int, high: int) -> int:
    if not _is_number(number) or not low <= number <= high or number != int(number):
        raise NeVAError(f"The {what} must be a whole number from {low} to {high}.")
    return int(number)


def _is_number(number: Any) -> bool:
    return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
