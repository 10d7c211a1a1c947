"""The control for every choice of neurons: as many and as large edits, on neurons that were drawn."""

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
    """Random neurons with edits of the same number and size.

    With a map, each value's shifts in a down projection are kept and dealt out to as many neurons of the same projection,
    drawn without repetition, each with a sign that was drawn; the map's gains go along, with signs of their own. Without
    a map, each value gets `neurons` neurons of the middle layers, with shifts drawn from a normal distribution.

    Args:
        evidence ([`Evidence`]): Its model, values and seed; nothing is learnt from scenarios.
        neuron_map ([`NeuronMap`], *optional*): The map to imitate.
        neurons (`int`, *optional*): How many per value, without a map; 200, or all where there are fewer.

    Returns:
        [`Method`]: Strength 1 applies the edits as they are (with the map's unit of strength +1, if there is a map).

    Raises:
        `NeVAError`: If the map lacks a value or does not fit the model, or there are not so many neurons.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    modules = find_down_projections(evidence.model)
    sizes = {name: layer_sizes(module)[0] for name, module in modules.items()}
    gains: dict[str, torch.Tensor] | None = None
    if neuron_map is None:
        names = [list(modules)[layer] for layer in middle_layers(len(modules))]
        vectors = _drawn(evidence.values, {name: sizes[name] for name in names}, neurons, generator)
    else:
        vectors, gains = _dealt(evidence.values, sizes, neuron_map, generator)
    at = adding(evidence.model, evidence.values, vectors, gains=gains, at_input=True)
    edited = {
        name: vector != 0 if gains is None else (vector != 0) | (gains[name] != 0) for name, vector in vectors.items()
    }
    counts = {value: int(sum(one[row].sum() for one in edited.values())) for row, value in enumerate(evidence.values)}
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
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Shifts and, where the map has some, gains: module -> `[values, neurons of the module]`."""
    missing = [value for value in values if value not in neuron_map.values]
    unknown = [name for name in neuron_map.modules if name not in sizes]
    if missing or unknown:
        what = f"the values {missing}" if missing else f"down projections that this model does not have: {unknown[:3]}"
        raise NeVAError(f"The map to imitate {'lacks' if missing else 'edits'} {what}.")
    use_gain = neuron_map.config.use_gain
    dealt: list[dict[str, torch.Tensor]] = [{}, {}] if use_gain else [{}]
    for name, edits in neuron_map.modules.items():
        parts = [edits.shift] if edits.gain is None else [edits.shift, edits.gain]
        for vectors in dealt:
            vectors[name] = torch.zeros(len(values), sizes[name])
        for row, value in enumerate(values):
            own = torch.stack([part[neuron_map.values.index(value)].float() for part in parts])
            own = own[:, (own != 0).any(0)] * neuron_map.config.units.get(value, [1.0, 1.0])[1]
            where = torch.randperm(sizes[name], generator=generator)[: own.shape[1]]
            for vectors, part in zip(dealt, own, strict=True):
                signs = torch.randint(0, 2, (len(part),), generator=generator) * 2 - 1
                vectors[name][row, where] = part * signs
    return dealt[0], dealt[1] if use_gain else None
