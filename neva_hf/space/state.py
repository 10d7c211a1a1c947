"""What a visitor has set: dials, question, seed. As presets to begin with, and as a link that brings it all back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import urlencode

from neva_hf.card_text import is_repo_id

Dials: TypeAlias = dict[str, float]
"""Value -> strength; values that are not named are at 0."""

MAX_SEED = 2**32 - 1
_MOST_QUESTION = 2000
_MOST_DIALS = 4000


@dataclass(frozen=True)
class Preset:
    """A mixture of dials with a name.

    Args:
        key (`str`): What code calls it.
        name (`str`): What people read.
        text (`str`): What it is, in a sentence.
        dials (`dict[str, float]`): The mixture.
    """

    key: str
    name: str
    text: str
    dials: Dials


@dataclass(frozen=True)
class Link:
    """What a link brings back.

    Args:
        dials (`dict[str, float]`): The dials that are not at 0.
        question (`str`): What is asked. A stranger's text: escape it.
        seed (`int`): For sampling.
        temperature (`float`): For sampling.
        gate (`bool`): Whether gates are used.
        map (`str`): A repository on the Hub, or nothing.
        notes (`tuple[str, ...]`): What in the link could not be used, in sentences.
    """

    dials: Dials = field(default_factory=dict)
    question: str = ""
    seed: int = 0
    temperature: float = 0.0
    gate: bool = False
    map: str = ""
    notes: tuple[str, ...] = ()


# Opposite values are turned against each other a little, as they are in people. The squares of the strengths, which is
# what the damage goes with, come to about 2 in each.
PRESETS: list[Preset] = [
    Preset(
        "caring_friend",
        "A caring friend",
        "The people close to you come first, before winning and leading.",
        {"benevolence": 1.3, "universalism": 0.4, "power": -0.5},
    ),
    Preset(
        "careful_planner",
        "A careful planner",
        "Safe, orderly, and prepared for what may come.",
        {"security": 1.3, "conformity": 0.4, "stimulation": -0.5},
    ),
    Preset(
        "bold_explorer",
        "A bold explorer",
        "Whatever is new, and by one's own way.",
        {"stimulation": 1.2, "self_direction": 0.7, "security": -0.4},
    ),
    Preset(
        "strict_manager",
        "A strict manager",
        "In charge, ambitious, and by the rules.",
        {"power": 1.1, "achievement": 0.6, "conformity": 0.5, "benevolence": -0.4},
    ),
    Preset(
        "bon_vivant",
        "A bon vivant",
        "Life is there to be enjoyed.",
        {"hedonism": 1.4, "conformity": -0.5},
    ),
    Preset(
        "keeper_of_customs",
        "A keeper of customs",
        "As it was handed down, with respect and without a fuss.",
        {"tradition": 1.3, "conformity": 0.4, "self_direction": -0.5},
    ),
    Preset(
        "world_improver",
        "A world improver",
        "Justice and nature, for everybody.",
        {"universalism": 1.3, "benevolence": 0.4, "power": -0.5},
    ),
    Preset(
        "high_achiever",
        "A high achiever",
        "Do it well, and let it be seen.",
        {"achievement": 1.3, "power": 0.4, "universalism": -0.5},
    ),
]

QUESTIONS: list[str] = [
    "I have a free weekend. What should I do with it?",
    "I just got a large bonus at work. What should I do with it?",
    "A new colleague joined our team today. How should I treat them?",
    "My boss asks me to work late, but I promised to visit a friend. What should I do?",
    "I was offered a job in another country. Should I take it?",
    "My family wants to celebrate the holiday as always. I would like something new. What now?",
    "What makes a good life?",
]
"""Questions where values matter."""


def presets_for(values: Sequence[str], ranges: Mapping[str, tuple[float, float]] | None = None) -> list[Preset]:
    """The presets of a map: those of Schwartz's ten values, if it has them all, else none.

    Args:
        values (`Sequence[str]`): The map's values.
        ranges (`dict[str, tuple[float, float]]`, *optional*): How far they stay fluent; presets stay within.

    Returns:
        `list[Preset]`: In the order in which they are shown.

    Example:

    ```py
    >>> from neva_hf.space.state import presets_for
    >>> presets_for(["openness", "extraversion"])
    []
    ```
    """
    if not {name for preset in PRESETS for name in preset.dials} <= set(values):
        return []
    ranges = ranges or {}
    everything = (-math.inf, math.inf)
    return [
        Preset(
            preset.key,
            preset.name,
            preset.text,
            {name: _within(strength, ranges.get(name, everything)) for name, strength in preset.dials.items()},
        )
        for preset in PRESETS
    ]


def to_link(
    dials: Mapping[str, float],
    question: str,
    seed: int,
    *,
    temperature: float = 0.0,
    gate: bool = False,
    map: str = "",
) -> str:
    """A state as the query of a link, without the question mark.

    Args:
        dials (`dict[str, float]`): The dials.
        question (`str`): What is asked.
        seed (`int`): For sampling.
        temperature (`float`): For sampling.
        gate (`bool`): Whether gates are used.
        map (`str`): The visitor's own map, if it is one.

    Returns:
        `str`: For the end of an address; [`from_link`] reads it.

    Example:

    ```py
    >>> from neva_hf.space.state import to_link
    >>> to_link({"benevolence": 1.5, "power": -0.5}, "What now?", 3)
    'dials=benevolence:1.5,power:-0.5&q=What+now%3F&seed=3'
    ```
    """
    turned = ",".join(f"{name}:{strength:g}" for name, strength in dials.items() if strength)
    fields = {"dials": turned, "q": question, "seed": str(seed) if seed else ""}
    fields |= {"t": f"{temperature:g}" if temperature else "", "gate": "1" if gate else "", "map": map}
    return urlencode({key: text for key, text in fields.items() if text}, safe=":,/")


def from_link(query: Mapping[str, str], values: Sequence[str], *, reach: float = 4.0) -> Link:
    """Reads what [`to_link`] wrote, or whatever else an address holds. It never raises.

    Args:
        query (`dict[str, str]`): The parameters of the address.
        values (`Sequence[str]`): The values that there are.
        reach (`float`): How far dials may be turned.

    Returns:
        [`Link`]: What could be read. The notes say what could not, without repeating it.

    Example:

    ```py
    >>> from neva_hf.space.state import from_link
    >>> from_link({"dials": "power:9,luck:1"}, ["power"], reach=4.0).dials
    {'power': 4.0}
    ```
    """
    notes: list[str] = []
    texts = {key: text if isinstance(text := query.get(key), str) else "" for key in _KEYS}
    dials, dial_notes = _read_dials(texts["dials"], values, reach)
    notes += dial_notes
    question = "".join(sign for sign in texts["q"] if sign.isprintable() or sign in "\n\t").strip()
    if len(question) > _MOST_QUESTION:
        question = question[:_MOST_QUESTION]
        notes.append("The question in the link was too long and is cut.")
    seed = _number(texts["seed"] or "0")
    if seed is None or not 0 <= seed <= MAX_SEED or seed != int(seed):
        seed = 0
        notes.append("The seed in the link cannot be used; it is 0 now.")
    temperature = _number(texts["t"] or "0")
    if temperature is None or not 0 <= temperature <= 2:
        temperature = 0.0
        notes.append("The temperature in the link cannot be used; it is 0 now.")
    named = texts["map"].strip()
    if named and (named.count("/") != 1 or not is_repo_id(named)):
        named = ""
        notes.append("The map in the link is no repository on the Hub; the page's own map is used.")
    return Link(dials, question, int(seed), temperature, texts["gate"] == "1", named, tuple(notes))


_KEYS = ("dials", "q", "seed", "t", "gate", "map")


def _read_dials(text: str, values: Sequence[str], reach: float) -> tuple[Dials, list[str]]:
    dials: Dials = {}
    unknown = unread = cut = False
    for part in filter(None, text[:_MOST_DIALS].split(",")):
        name, _, written = part.partition(":")
        strength = _number(written)
        if name not in values:
            unknown = True
        elif strength is None:
            unread = True
        else:
            cut = cut or abs(strength) > reach
            dials[name] = _within(strength, (-reach, reach))
    notes = ["Some of the dials in the link are none of this map's; they are left out."] if unknown else []
    notes += ["Some of the dials in the link are set to no number; they are left out."] if unread else []
    notes += [f"Dials go from {-reach:g} to {reach:g}; the link wanted more."] if cut else []
    return {name: dials[name] for name in values if dials.get(name)}, notes


def _number(text: str) -> float | None:
    try:
        # (a text of a million digits takes long to read)
        number = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _within(number: float, ends: tuple[float, float]) -> float:
    return min(max(number, ends[0]), ends[1])
