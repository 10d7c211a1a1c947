"""The model of the Space: loads a map, and streams the base model's answer and the edited one from one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neva_hf.neuron_map import NeuronMap
from neva_hf.values import ValueSystem

from .limits import Limits
from .state import Dials


class Exchange(NamedTuple):
    """One question and what both sides answered; each side goes on with its own answers."""

    question: str
    base: str
    edited: str


@dataclass(frozen=True)
class Turn:
    """Both answers so far. `note` says, in a sentence, why an answer ended early; `tokens` counts those of one row."""

    base: str
    edited: str
    done: bool
    tokens: int
    note: str = ""


@dataclass(frozen=True)
class Engine:
    """A base model with one neuron map, shared by all visitors. Nothing of a visitor is kept in it.

    `name`: what people read; `source`: what `NeVAModel.from_pretrained` takes; `values`: dials in circle order;
    `system`: definitions and angles of at least these values; `ranges`: fluent range per value; `reach`: how far dials
    may be turned at all (beyond the range is warned about, beyond the reach refused); `has_gate`.
    """

    name: str
    source: str
    values: list[str]
    system: ValueSystem
    ranges: dict[str, tuple[float, float]]
    reach: float
    map: NeuronMap
    has_gate: bool
    limits: Limits

    @classmethod
    def load(cls, map_source: str | None = None, base: str | None = None, device: str | None = None) -> Engine:
        """Loads a map that the owner of the page trusts (folder or Hub repository) and its base model."""
        raise NotImplementedError

    def for_map(self, repo_id: str) -> Engine:
        """An engine for a visitor's map from the Hub on the same base model ('' is this one). Raises NeVAError."""
        return self

    def beyond(self, dials: Mapping[str, float]) -> list[str]:
        """The values that are dialled beyond their fluent range."""
        return [name for name, s in dials.items() if not self.ranges[name][0] <= s <= self.ranges[name][1]]

    def stream(
        self,
        history: Sequence[Exchange | Sequence[str]],
        question: str,
        dials: Dials,
        *,
        seed: int = 0,
        max_new_tokens: int = 120,
        temperature: float = 0.0,
        gate: bool = False,
    ) -> Iterator[Turn]:
        """Both answers, as they grow. NeVAError (before the first turn or at it) for what is not allowed."""
        raise NotImplementedError
