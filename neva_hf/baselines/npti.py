"""NPTI: neurons that are active more often with a trait are pushed up, those of its opposite are held down."""

from __future__ import annotations

import torch
from torch import nn

from .hooks import Call, Change, Edit, per_row, steering
from .method import At, Evidence, Method

# From how large a difference of activation probability on a neuron belongs to a value.
DIFFERENCE = 0.1
PERCENTILE = 0.95


def npti(evidence: Evidence, *, difference: float = DIFFERENCE) -> Method:
    """Neuron-based Personality Trait Induction (Deng et al. 2024, arXiv 2410.12327; its manipulation as in its code).

    With D the difference, between a value's replies and the competing ones, of the share of tokens at which the activation
    function's output is above 0: neurons with D > 0.1 belong to the value, those with D < -0.1 to its opposite. For a
    positive strength the value's neurons get `gamma * a95 * sigmoid(10 * (|D| - 0.15))` added, a95 being the 95th
    percentile of the neuron's output, and the opposite's are clamped to at most 0; for a negative one the two change
    places. gamma is the size of the strength.

    What is ours: a95 is taken over all replies' tokens (from a histogram, to a few per cent), not those of one trait; and
    below strength 1 the clamp takes away only that part of what is above 0, so that a small strength does little. In
    models whose activation function is no module of its own, what the down projection reads stands in for it.

    Args:
        evidence ([`Evidence`]): What to learn from.
        difference (`float`): From which |D| on.

    Returns:
        [`Method`]: The strength is gamma. A value without such neurons cannot be dialled: its strength does nothing.

    Raises:
        `NeVAError`: If no training scenario contrasts one of the values.
    """
    readings = evidence.readings
    active = readings.mean_active()
    size = readings.quantile(PERCENTILE) * torch.sigmoid(10 * (active.abs() - 0.15))
    raised, lowered = active > difference, active < -difference
    names = readings.activations or readings.modules
    at = pushing(
        evidence.model,
        readings.values,
        names,
        torch.where(raised | lowered, size, 0.0),
        raised,
        lowered,
        at_input=readings.activations is None,
    )
    counts = {
        value: [int(up.sum()), int(down.sum())]
        for value, up, down in zip(readings.values, raised, lowered, strict=True)
    }
    notes: dict[str, object] = {"neurons": counts}
    if readings.activations is None:
        notes["read_at"] = "the down projection's input"
    return Method("NPTI", readings.values, at, notes=notes)


def pushing(
    model: nn.Module,
    values: list[str],
    names: list[str],
    size: torch.Tensor,
    raised: torch.Tensor,
    lowered: torch.Tensor,
    *,
    at_input: bool = False,
) -> At:
    """Dials that add to some neurons and clamp others. See [`npti`].

    Args:
        model (`nn.Module`): The model.
        values (`list[str]`): The values.
        names (`list[str]`): The modules of the layers.
        size (`torch.Tensor`): Float32 `[V, L, N]`, what is added at gamma 1.
        raised (`torch.Tensor`): Bool `[V, L, N]`, the value's neurons.
        lowered (`torch.Tensor`): Bool `[V, L, N]`, its opposite's.
        at_input (`bool`): Whether it is what the modules read that is changed.

    Returns:
        `At`: For a [`Method`].
    """

    def changed(add: torch.Tensor, clamp: torch.Tensor) -> Change:
        def change(x: torch.Tensor, _: Call) -> torch.Tensor:
            return x - per_row(clamp, x) * x.clamp(min=0) + per_row(add, x)

        return change

    def make(table: torch.Tensor) -> list[Edit]:
        up, down = table.clamp(min=0), (-table).clamp(min=0)
        edits = []
        for layer, name in enumerate(names):
            own, other = raised[:, layer].float(), lowered[:, layer].float()
            add = up @ (own * size[:, layer]) + down @ (other * size[:, layer])
            clamp = (up.clamp(max=1) @ other + down.clamp(max=1) @ own).clamp(max=1)
            if bool(add.any()) or bool(clamp.any()):
                edits.append(Edit(name, changed(add, clamp), at_input))
        return edits

    return steering(model, values, make)
