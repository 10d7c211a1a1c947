"""The baseline that needs no method: telling the model what to value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from neva_hf.values import load_value_system

from .hooks import strength_table
from .method import Dials, Evidence, Method


def system_prompt(evidence: Evidence, *, definitions: bool = False) -> Method:
    """A system prompt per value: "You have a high level of benevolence.", or "low" for a negative strength.

    The wording is that with which people induce values and traits by prompts (the prompt baseline of the works on neuron
    editing, such as NPTI, Deng et al. 2024, arXiv 2410.12327). How strong a strength is makes no difference; its sign does.

    Args:
        evidence ([`Evidence`]): Its values.
        definitions (`bool`): Whether to say what the value means, where a shipped value system defines it.

    Returns:
        [`Method`]: Not scalable: a prompt costs what it costs.

    Example:

    ```py
    >>> from neva_hf.baselines.system_prompt import sentence
    >>> sentence("self_direction", -1.0)
    'You have a low level of self-direction.'
    ```
    """
    values = list(evidence.values)

    @contextmanager
    def at(rows: Sequence[Dials]) -> Iterator[None]:
        strength_table(rows, values)
        yield

    def system(dials: Dials) -> str | None:
        strength_table([dials], values)
        sentences = [sentence(value, dials[value], definitions) for value in values if dials.get(value, 0.0) != 0]
        return " ".join(sentences) or None

    example = sentence(values[0], 1.0, definitions) if values else ""
    return Method("System prompt", values, at, system, scalable=False, notes={"prompt": example})


def sentence(value: str, strength: float, definition: bool = False) -> str:
    """What the prompt says about one value.

    Args:
        value (`str`): Its name.
        strength (`float`): Above or below 0.
        definition (`bool`): Whether to add what it means, where that is known.

    Returns:
        `str`: A sentence.
    """
    label, meaning = _shipped().get(value, (value.replace("_", " "), ""))
    said = f"You have a {'high' if strength > 0 else 'low'} level of {label.lower()}"
    return f"{said} ({meaning.rstrip('.')})." if definition and meaning else f"{said}."


@cache
def _shipped() -> dict[str, tuple[str, str]]:
    """Value -> label and definition, of the shipped systems."""
    found: dict[str, tuple[str, str]] = {}
    for name in ("schwartz19", "big_five", "schwartz10"):
        found |= {value.name: (value.label, value.definition) for value in load_value_system(name)}
    return found
