"""RepE's reading vectors: the first principal component of paired differences, added in many layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from neva_hf.errors import NeVAError

from .hooks import adding
from .method import Evidence, Method
from .readings import Readings

Centring = Literal["pca_center", "pca_diff"]

# repeng's own examples steer layers -5 to -18 of 32: from 45% to 85% of the depth.
PART = (0.45, 0.85)


def repe(evidence: Evidence, *, centring: Centring = "pca_center", layers: Sequence[int] | None = None) -> Method:
    """Representation engineering by principal components (Zou et al. 2023, arXiv 2310.01405, section 3.1; as in `repeng`).

    Every reply of a value and a reply that competes with it are a pair; strength times the direction of the pairs (see
    [`directions`]), of length 1, is added behind each of the layers, at all positions.

    Args:
        evidence ([`Evidence`]): What to learn from.
        centring (`str`): See [`directions`].
        layers (`Sequence[int]`, *optional*): Where to add; those from 45% to 85% of the depth by default.

    Returns:
        [`Method`]: Strength 1 adds vectors of length 1.

    Raises:
        `NeVAError`: If a layer does not exist, or no training scenario contrasts one of the values.
    """
    readings = evidence.readings
    depth = len(readings.blocks)
    middle = [layer for layer in range(depth) if PART[0] <= (layer + 0.5) / depth < PART[1]] or list(range(depth))
    chosen = list(layers) if layers is not None else middle
    if not chosen or not all(0 <= layer < depth for layer in chosen):
        raise NeVAError(f"`layers` must be numbers from 0 to {depth - 1}, got {chosen}.")
    found = directions(readings, chosen, centring)
    vectors = {readings.blocks[layer]: found[:, number] for number, layer in enumerate(chosen)}
    at = adding(evidence.model, readings.values, vectors)
    return Method("RepE", readings.values, at, notes={"layers": chosen, "centring": centring})


def directions(readings: Readings, layers: Sequence[int], centring: Centring = "pca_center") -> torch.Tensor:
    """The first principal component of paired differences of the residual stream at the last token.

    With d = h(own reply) - h(competing reply): `"pca_center"` takes the component of the pairs around their own middles,
    which is the first eigenvector of the sum of d d'; `"pca_diff"` that of the differences themselves, whose mean is taken
    away first. The sign is that by which the own reply is above the competing one in most pairs.

    Args:
        readings ([`Readings`]): What the pass gave.
        layers (`Sequence[int]`): Of which layers.
        centring (`str`): `"pca_center"` or `"pca_diff"`.

    Returns:
        `torch.Tensor`: Float32 `[V, layers, H]`, of length 1.

    Raises:
        `NeVAError`: For another `centring`.
    """
    if centring not in ("pca_center", "pca_diff"):
        raise NeVAError(f"`centring` must be 'pca_center' or 'pca_diff', got {centring!r}.")
    found = torch.zeros(len(readings.values), len(layers), readings.last.shape[2])
    for value, pairs in enumerate(readings.pairs):
        own = torch.tensor([pair.own for pair in pairs for _ in pair.rivals])
        rivals = torch.tensor([row for pair in pairs for row in pair.rivals])
        for number, layer in enumerate(layers):
            difference = (readings.last[own, layer] - readings.last[rivals, layer]).double()
            spread = difference - difference.mean(0) if centring == "pca_diff" else difference
            # (the eigenvector of the largest eigenvalue is the last)
            first = torch.linalg.eigh(spread.T @ spread).eigenvectors[:, -1]
            raised = (difference @ first).sign().sum()
            found[value, number] = (-first if raised < 0 else first).float()
    return found
