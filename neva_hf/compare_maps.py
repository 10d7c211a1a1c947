"""Neuron maps beside each other: what two have in common, and several of one base model in one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .architectures import architecture_differences
from .errors import NeVAError
from .fingerprint import Verdict, verdict
from .map_files import natural_order
from .neuron_map import NeuronMap

Edits = dict[int, tuple[float, float]]
"""Edited neuron -> its shift and its gain, of one value in one module."""


@dataclass(frozen=True)
class Agreement:
    """How far two edits agree.

    Args:
        neurons_a (`int`): Neurons that the first edits, by a shift, a gain or both.
        neurons_b (`int`): Neurons that the second edits.
        shared (`int`): Neurons that both edit.
        overlap (`float`): Shared neurons over neurons in either, 0 to 1.
        spearman (`float`, *optional*): Rank correlation of the two shifts of shared neurons, -1 to 1; `None` for fewer
            than three, or where all shifts of one are equal.
        cosine (`float`, *optional*): Of the two edits' shifts, over the neurons in either (0 where one leaves a neuron
            alone), -1 to 1; `None` where one has no shifts.
        gain_spearman (`float`, *optional*): Rank correlation of the two gains of shared neurons, likewise; `None` also
            where one has no gains.
        gain_cosine (`float`, *optional*): Of the two edits' gains, likewise.
    """

    neurons_a: int
    neurons_b: int
    shared: int
    overlap: float
    spearman: float | None
    cosine: float | None
    gain_spearman: float | None = None
    gain_cosine: float | None = None


@dataclass(frozen=True)
class ValueComparison:
    """What two maps do for one value.

    Args:
        value_a (`str`): Its name in the first map.
        value_b (`str`): Its name in the second.
        together ([`Agreement`]): Over all modules.
        modules (`dict[str, Agreement]`): Module name -> that module alone, where either edits a neuron.
    """

    value_a: str
    value_b: str
    together: Agreement
    modules: dict[str, Agreement]


@dataclass(frozen=True)
class MapComparison:
    """What two maps have in common.

    Args:
        weights (`str`): Whether both were made on the same weights: `"same"`, `"slightly different"`, `"different"`,
            `"unrelated"` or `"unknown"` (see [`~neva_hf.fingerprint.verdict`]).
        values (`list[ValueComparison]`): The values that were compared, in the first map's order.
        modules (`dict[str, Agreement]`): Module name -> all compared values together.
        only_a (`list[str]`): Values of the first map that were not compared.
        only_b (`list[str]`): Values of the second map that were not compared.
    """

    weights: Verdict
    values: list[ValueComparison]
    modules: dict[str, Agreement]
    only_a: list[str]
    only_b: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def compare_maps(a: NeuronMap, b: NeuronMap, pairs: Mapping[str, str] | None = None) -> MapComparison:
    """Compares two maps of one base model, or of fine-tunes of one, value by value and module by module.

    Args:
        a ([`NeuronMap`]): The first.
        b ([`NeuronMap`]): The second.
        pairs (`Mapping[str, str]`, *optional*): Value in the first -> value in the second to compare it with. Values of
            the same name when `None`.

    Returns:
        [`MapComparison`]: What they have in common.

    Raises:
        `NeVAError`: If the maps are for different architectures, whose neurons have nothing to do with each other, or
            have no value in common.

    Example:

    ```py
    >>> from neva_hf import NeuronMap
    >>> from neva_hf.compare_maps import compare_maps
    >>> found = compare_maps(NeuronMap.from_pretrained("a"), NeuronMap.from_pretrained("b"))  # doctest: +SKIP
    >>> {one.value_a: one.together.overlap for one in found.values}  # doctest: +SKIP
    {'benevolence': 0.31, 'power': 0.28}
    ```
    """
    refuse_other_architecture(a, b)
    pairs = {value: value for value in a.values if value in b.values} if pairs is None else pairs
    if not pairs:
        raise NeVAError(
            f"The two maps have no value in common: the first has {', '.join(a.values)}, the second {', '.join(b.values)}."
            " Say which to compare."
        )
    edits = {(one, two): (_edits(a, one), _edits(b, two)) for one, two in pairs.items()}
    values = []
    for (one, two), (ours, theirs) in edits.items():
        modules = {name: _agreement([(ours.get(name, {}), theirs.get(name, {}))]) for name in _either(ours, theirs)}
        together = _agreement([(ours.get(name, {}), theirs.get(name, {})) for name in modules])
        values.append(ValueComparison(one, two, together, modules))
    names = sorted({name for one in values for name in one.modules}, key=natural_order)
    return MapComparison(
        weights=verdict((a.config.base or {}).get("fingerprint"), (b.config.base or {}).get("fingerprint")),
        values=values,
        modules={
            name: _agreement([(ours.get(name, {}), theirs.get(name, {})) for ours, theirs in edits.values()])
            for name in names
        },
        only_a=[value for value in a.values if value not in pairs],
        only_b=[value for value in b.values if value not in pairs.values()],
    )


def refuse_other_architecture(a: NeuronMap, b: NeuronMap) -> None:
    """Raises a [`NeVAError`] if two maps are for models of different architectures, as far as they tell."""
    differing = architecture_differences(a.config.base or {}, b.config.base or {})
    if differing:
        said = "; ".join(text.replace(", the map needs ", " in one and ") + " in the other" for text in differing)
        bases = " and ".join(one.base_model or "an unnamed one" for one in (a, b))
        raise NeVAError(
            f"The maps are for different models ({bases:.240}): {said}. Neurons of different models have nothing to do "
            "with each other."
        )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation of two lists of the same length; equal numbers share their mean rank.

    Args:
        first (`Sequence[float]`): Numbers.
        second (`Sequence[float]`): As many.

    Returns:
        `float`: -1 to 1. `None` for fewer than three, or where all numbers of a list are equal.

    Example:

    ```py
    >>> from neva_hf.compare_maps import spearman
    >>> spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    ```
    """
    if len(first) < 3:
        return None
    ranks = []
    for numbers in (first, second):
        _, place, counts = torch.tensor(numbers, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
        # The last of a run of equal numbers has as rank the count up to it; the mean is half a run before.
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[place])
    one, two = (rank - rank.mean() for rank in ranks)
    size = math.sqrt(float(one @ one) * float(two @ two))
    return None if size == 0 else max(-1.0, min(1.0, round(float(one @ two) / size, 12)))


def _edits(neuron_map: NeuronMap, value: str) -> dict[str, Edits]:
    """Module name -> edited neuron -> its shift and its gain."""
    found: dict[str, Edits] = {}
    neurons = neuron_map.neurons(value)
    row = neuron_map.values.index(value)
    for name, kept in neurons.items():
        edits = neuron_map.modules[name]
        gain = torch.zeros_like(edits.shift) if edits.gain is None else edits.gain
        both = zip(edits.shift[row].tolist(), gain[row].tolist(), strict=True)
        parts = dict(zip(edits.index.tolist(), both, strict=True))
        found[name] = {neuron: parts[neuron] for neuron in kept.tolist()}
    return found


def _either(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(ours.keys() | theirs.keys(), key=natural_order)


def _agreement(pairs: Sequence[tuple[Edits, Edits]]) -> Agreement:
    """Of one value in one module, or of several of both taken together."""
    shared = sum(len(ours.keys() & theirs.keys()) for ours, theirs in pairs)
    either = sum(len(ours.keys() | theirs.keys()) for ours, theirs in pairs)
    ranks, cosine = _correlations(pairs, 0)
    gain_ranks, gain_cosine = _correlations(pairs, 1)
    return Agreement(
        neurons_a=sum(len(ours) for ours, _ in pairs),
        neurons_b=sum(len(theirs) for _, theirs in pairs),
        shared=shared,
        overlap=shared / max(either, 1),
        spearman=ranks,
        cosine=cosine,
        gain_spearman=gain_ranks,
        gain_cosine=gain_cosine,
    )


def _correlations(pairs: Sequence[tuple[Edits, Edits]], part: int) -> tuple[float | None, float | None]:
    """Rank correlation over shared neurons and cosine over all, of shifts (part 0) or of gains (part 1)."""
    first, second = [], []
    for ours, theirs in pairs:
        for neuron in ours.keys() & theirs.keys():
            first.append(ours[neuron][part])
            second.append(theirs[neuron][part])
    sizes = [math.hypot(*(one[part] for pair in pairs for one in pair[side].values())) for side in (0, 1)]
    product = sum(one * two for one, two in zip(first, second, strict=True))
    cosine = None if 0.0 in sizes else max(-1.0, min(1.0, product / sizes[0] / sizes[1]))
    return spearman(first, second), cosine
