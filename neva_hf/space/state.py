"""What a visitor has set: dials, question, seed; as a link and back, and presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Dials: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Preset:
    """A mixture with a name: `key` for code, `name` and `text` for people."""

    key: str
    name: str
    text: str
    dials: Dials


@dataclass(frozen=True)
class Link:
    """What a link restores. `notes` are sentences about what in it could not be used."""

    dials: Dials = field(default_factory=dict)
    question: str = ""
    seed: int = 0
    temperature: float = 0.0
    gate: bool = False
    map: str = ""
    notes: tuple[str, ...] = ()


PRESETS: list[Preset] = [
    Preset("caring_friend", "A caring friend", "People first.", {"benevolence": 1.5, "power": -0.5})
]
QUESTIONS: list[str] = ["What should I do with a free weekend?"]


def presets_for(values: Sequence[str], ranges: Mapping[str, tuple[float, float]] | None = None) -> list[Preset]:
    """The presets whose values a map has; none for another value system. Kept within the fluent ranges."""
    return [preset for preset in PRESETS if set(preset.dials) <= set(values)]


def to_link(
    dials: Mapping[str, float],
    question: str,
    seed: int,
    *,
    temperature: float = 0.0,
    gate: bool = False,
    map: str = "",
) -> str:
    """A query string without the question mark: `dials=benevolence:1.5,power:-0.5&q=...&seed=3`."""
    return ""


def from_link(query: Mapping[str, str], values: Sequence[str], *, reach: float = 4.0) -> Link:
    """Reads a link; never raises."""
    return Link()
