"""What dials do and cost, and what a map's neurons are: read from the map, and for tokens from the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .engine import Engine


@dataclass(frozen=True)
class Expected:
    """What the current dials are expected to do together (an estimate from each dial's own curve).

    `control`: dialled value -> shift of its margin; `others`: the other values -> shift of theirs; `leakage`: the rate
    (0.1: the others move a tenth as much as the dialled ones), None where nothing moves as dialled; `kl`: damage, nats
    per token; `strength`: the single dial that would cost as much (1 is the calibrated unit).
    """

    control: dict[str, float]
    others: dict[str, float]
    leakage: float | None
    kl: float
    strength: float


@dataclass(frozen=True)
class LayerNeurons:
    """The neurons of one value in one layer: `index` and, of the same length, their `shift` at strength 1."""

    layer: int
    module: str
    index: list[int]
    shift: list[float]


@dataclass(frozen=True)
class NeuronFacts:
    """One neuron. `shift`, `score` (what its shift writes, as a share of the value's largest) and `rank` (1 is the
    largest of the value's neurons) per value that edits it; tokens are plain text of a stranger: escape them."""

    module: str
    layer: int
    index: int
    shift: dict[str, float]
    score: dict[str, float]
    rank: dict[str, int]
    promoted: list[str]
    suppressed: list[str]


def expected_of(engine: Engine, dials: Mapping[str, float]) -> Expected | None:
    """None where the map has no (sound) curves. All dials at 0: nothing moves, KL 0."""
    return None


def layers(engine: Engine, value: str) -> list[LayerNeurons]:
    """The layers that hold neurons of a value, in order."""
    return []


def overlap(engine: Engine) -> list[list[float]]:
    """Rows and columns in the order of `engine.values`: neurons in both over neurons in either, 0 to 1."""
    return [[float(a == b) for a in engine.values] for b in engine.values]


def neuron(engine: Engine, module: str, index: int, tokens: int = 10) -> NeuronFacts:
    """One neuron. Reads weights (on ZeroGPU: call it where a GPU is)."""
    raise NotImplementedError
