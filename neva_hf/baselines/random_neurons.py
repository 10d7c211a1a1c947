"""The control for every choice of neurons: as many and as large shifts, on neurons that were drawn."""

from __future__ import annotations

import torch

from neva_hf.architectures import find_down_projections
from neva_hf.errors import NeVAError
from neva_hf.identify.select import middle_layers
from neva_hf.neuron_map import NeuronMap
from neva_hf.projection import layer_sizes

from .hooks import adding
from .method import Evidence, Method

NEURONS = 200


def random_neurons(evidence: Evidence, *, neuron_map: NeuronMap | None = None, neurons: int | None = None) -> Method:
    """Random neurons with shifts of the same number and size.

    With a map, each value's shifts in a down projection are kept and dealt out to as many neurons of the same projection,
    drawn without repetition, each with a sign that was drawn. Without one, each value gets `neurons` neurons of the middle
    layers, with shifts drawn from a normal distribution.

    Args:
        evidence ([`Evidence`]): Its model, values and seed; nothing is learnt from scenarios.
        neuron_map ([`NeuronMap`], *optional*): The map to imitate.
        neurons (`int`, *optional*): How many per value, without a map; 200, or all where there are fewer.

    Returns:
        [`Method`]: Strength 1 adds the shifts as they are (with the map's unit of strength +1, if there is a map).

    Raises:
        `NeVAError`: If the map lacks a value or does not fit the model, or there are not so many neurons.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    modules = find_down_projections(evidence.model)
    sizes = {name: layer_sizes(module)[0] for name, module in modules.items()}
    if neuron_map is None:
        names = [list(modules)[layer] for layer in middle_layers(len(modules))]
        vectors = _drawn(evidence.values, {name: sizes[name] for name in names}, neurons, generator)
    else:
        vectors = _dealt(evidence.values, sizes, neuron_map, generator)
    at = adding(evidence.model, evidence.values, vectors, at_input=True)
    counts = {
        value: int(sum((vector[row] != 0).sum() for vector in vectors.values()))
        for row, value in enumerate(evidence.values)
    }
    return Method("Random neurons", list(evidence.values), at, notes={"neurons": counts, "seed": evidence.seed})


def _drawn(
    values: list[str], sizes: dict[str, int], neurons: int | None, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    total = sum(sizes.values())
    neurons = min(NEURONS, total) if neurons is None else neurons
    if not 1 <= neurons <= total:
        raise NeVAError(f"`neurons` must be 1 to {total} for the middle layers of this model, got {neurons}.")
    flat = torch.zeros(len(values), total)
    for row in range(len(values)):
        flat[row, torch.randperm(total, generator=generator)[:neurons]] = torch.randn(neurons, generator=generator)
    return dict(zip(sizes, flat.split(list(sizes.values()), dim=1), strict=True))


def _dealt(
    values: list[str], sizes: dict[str, int], neuron_map: NeuronMap, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    missing = [value for value in values if value not in neuron_map.values]
    unknown = [name for name in neuron_map.modules if name not in sizes]
    if missing or unknown:
        what = f"the values {missing}" if missing else f"down projections that this model does not have: {unknown[:3]}"
        raise NeVAError(f"The map to imitate {'lacks' if missing else 'edits'} {what}.")
    vectors = {}
    for name, edits in neuron_map.modules.items():
        vectors[name] = torch.zeros(len(values), sizes[name])
        for row, value in enumerate(values):
            shift = edits.shift[neuron_map.values.index(value)].float()
            shift = shift[shift != 0] * neuron_map.config.units.get(value, [1.0, 1.0])[1]
            where = torch.randperm(sizes[name], generator=generator)[: len(shift)]
            signs = torch.randint(0, 2, (len(shift),), generator=generator) * 2 - 1
            vectors[name][row, where] = shift * signs
    return vectors
