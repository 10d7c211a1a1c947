"""Selection: from scores to the few neurons that each value edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from neva_hf.config import NeVAConfig
from neva_hf.errors import NeVAError
from neva_hf.neuron_map import ModuleEdits, NeuronMap


def middle_layers(layers: int) -> list[int]:
    """The layers that take part by default: from 20% to 95% of the depth.

    The first layers read words rather than values, and what the last ones write goes to the next token alone.

    Args:
        layers (`int`): How many there are.

    Returns:
        `list[int]`: Their numbers.

    Example:

    ```py
    >>> from neva_hf.identify.select import middle_layers
    >>> middle_layers(10)
    [2, 3, 4, 5, 6, 7, 8]
    ```
    """
    return [layer for layer in range(layers) if 0.2 <= (layer + 0.5) / layers < 0.95] or list(range(layers))


def check_request(neurons: int, layers: Sequence[int], depth: int, width: int) -> None:
    """Refuses layers that a model does not have, and more neurons than there are in them.

    Args:
        neurons (`int`): How many per value.
        layers (`Sequence[int]`): Which layers take part.
        depth (`int`): How many layers the model has.
        width (`int`): How many neurons each has.

    Raises:
        `NeVAError`: If there are no such layers or not so many neurons.
    """
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise NeVAError(f"`layers` must be numbers from 0 to {depth - 1}, got {list(layers)}.")
    if not 1 <= neurons <= len(set(layers)) * width:
        raise NeVAError(f"`neurons` must be 1 to {len(set(layers)) * width} for these layers, got {neurons}.")


def top_neurons(score: torch.Tensor, neurons: int, layers: Sequence[int]) -> torch.Tensor:
    """The highest-scoring neurons of each value.

    Args:
        score (`torch.Tensor`): `[V, L, N]`.
        neurons (`int`): How many per value, over all layers together.
        layers (`Sequence[int]`): Which layers take part.

    Returns:
        `torch.Tensor`: Bool `[V, L, N]`. Fewer where fewer have a positive score.

    Raises:
        `NeVAError`: If a layer does not exist, there are not so many neurons, or no neuron of a value scores.
    """
    values, depth, width = score.shape
    check_request(neurons, layers, depth, width)
    open_layers = torch.zeros(depth, dtype=torch.bool)
    open_layers[list(layers)] = True
    candidates = torch.where(open_layers[None, :, None] & (score > 0), score, -torch.inf).flatten(1)
    best = candidates.topk(neurons, dim=1)
    chosen = torch.zeros(values, depth * width, dtype=torch.bool)
    chosen.scatter_(1, best.indices, best.values > -torch.inf)
    if not bool(chosen.any(1).all()):
        raise NeVAError("No neuron has a positive score for one of the values: the scenarios do not tell it apart.")
    return chosen.reshape(values, depth, width)


def build_map(edits: torch.Tensor, chosen: torch.Tensor, modules: Sequence[str], config: NeVAConfig) -> NeuronMap:
    """Lays chosen neurons and what is done to them out as a map.

    Args:
        edits (`torch.Tensor`): How to shift neurons, float32 `[V, L, N]`, or shifts and gains, `[V, 2, L, N]`.
        chosen (`torch.Tensor`): Bool `[V, L, N]`.
        modules (`Sequence[str]`): The down projection of each layer.
        config ([`NeVAConfig`]): The map's config; its modules and counts are filled in, and whether it has gains.

    Returns:
        [`NeuronMap`]: With these edits.
    """
    parts = edits.unbind(1) if edits.ndim == 4 else [edits]
    made = {}
    for layer, module in enumerate(modules):
        index = chosen[:, layer].any(0).nonzero()[:, 0]
        if len(index):
            own = chosen[:, layer, index]
            found = [torch.where(own, part[:, layer, index], 0.0).float().contiguous() for part in parts]
            made[module] = ModuleEdits(index.to(torch.int32), *found)
    return NeuronMap(replace(config, use_gain=len(parts) == 2), made)
