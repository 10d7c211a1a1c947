"""Leakage-aware selection: the neurons, and the edits of them, that move one margin most and the others least.

To first order a shift d of the neurons moves the target's margin by `J.d` and the margin of another value u by `C_u.d`,
and by the second order it costs a KL divergence of `d.F.d / 2` on neutral text (sensitivity.py). The shift that gains
most for its cost, with the leakage `C d` charged, solves (ours; a ridge on the constraints of a natural gradient step)

    d = F^-1 (J - C^T l),   (C F^-1 C^T + mean(diag(C F^-1 C^T)) / penalty) l = C F^-1 J

so that a penalty of 0 leaves `F^-1 J`, and a large one puts every `C_u.d` to 0. A neuron's own part in that, with only
the diagonal of F, is its score: `(J - C^T l)^2 / F`. The neurons with the highest scores are candidates, and from them
those are dropped, some at a time, that are missed least: leaving neuron n out costs `d_n^2 / (F^-1)_nn` (the saliency of
Optimal Brain Surgeon, Hassibi and Stork 1992), so of neurons that do the same only one stays.

An edit has one or two parts, a shift and a gain. Gains are further coordinates of d: a neuron's score is then the sum of
both, and what leaving it out costs is `d_n.B^-1.d_n` with the block B of `F^-1` that belongs to both. Neutral text hardly
turns on the neurons that speak of a value, so there their gains cost little. In the value's own replies they do: what
an edit does there beyond the first order ([`reply_samples`]) may be charged as a part of F.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neva_hf.measure import Progress, no_progress

from .replies import ReplySamples
from .select import check_request, top_neurons
from .statistics import Statistics

# So many candidates for each neuron, of which this part stays in each round. The work grows with the cube of their number.
_CANDIDATES, _KEPT, _MAX_CANDIDATES = 6, 0.6, 6000
# Samples say little about single off-diagonal entries of F: they are halved, which also makes F invertible.
_SHRINKAGE = 0.5
# Neurons that hardly disturb neutral text would get endless shifts; F is kept above this part of its median.
_FLOOR = 0.05
# What the value's own replies weigh beside neutral text, where they are charged. With the target's margin at some 0.4 and
# the divergence at 0.05, a fourth would be best for strength 1 if the others' replies stayed as they are.
_OWN = 0.3


def diagonal(samples: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """The diagonal of the Fisher matrix, kept away from 0.

    Args:
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, parts, L, N]`.
        layers (`Sequence[int]`): The layers that take part.

    Returns:
        `torch.Tensor`: Float32 `[parts, L, N]`.
    """
    square = samples.square().mean(0)
    # (shifts and gains have units of their own)
    return square + _FLOOR * square[:, list(layers)].flatten(1).median(1).values[:, None, None]


def constraints(statistics: Statistics, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slope of the target's margin, and those of the others with the target's reply left out.

    A margin holds a reply against n competing ones, the target's among them, so every rise of the target would read as
    a fall of the others. Left out of the competition, the margin of u has the slope `J_u + J_target / n`, up to a factor
    (for scenarios in which all values have a reply). Values that are held against their own opposite stay as they are.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        target (`int`): The row of the target.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[parts, L, N]` and `[V - 1, parts, L, N]`.
    """
    gradient = statistics.mean_gradients()
    rivals = (statistics.rivals / statistics.count.clamp(min=1)).float()
    share = torch.where(rivals > 0, 1 / rivals.clamp(min=1), 0.0)
    others = [row for row in range(len(statistics.values)) if row != target]
    return gradient[target], gradient[others] + share[others, None, None, None] * gradient[target]


def balanced_scores(
    statistics: Statistics, samples: torch.Tensor, targets: int, penalty: float, layers: Sequence[int]
) -> torch.Tensor:
    """How much each neuron serves each value, once what it does to the others is charged.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, parts, L, N]`, of the parts that there are sums for.
        targets (`int`): For the first so many values; the others are only kept still.
        penalty (`float`): What leakage costs, above 0; 1 is a good compromise.
        layers (`Sequence[int]`): The layers that take part.

    Returns:
        `torch.Tensor`: Float32 `[targets, L, N]`.
    """
    weight = diagonal(samples, layers)
    closed = torch.ones(len(statistics.modules), dtype=torch.bool)
    closed[list(layers)] = False
    scores = []
    for target in range(targets):
        slope, others = constraints(statistics, target)
        slope, others = slope.clone(), others.clone()
        slope[:, closed], others[:, :, closed] = 0.0, 0.0
        left = slope - _charged(others.flatten(1), (others / weight).flatten(1), slope.flatten(), penalty).view_as(
            slope
        )
        scores.append((left.square() / weight).sum(0))
    return torch.stack(scores)


def candidates(
    statistics: Statistics,
    samples: torch.Tensor,
    targets: int,
    neurons: int,
    penalty: float,
    layers: Sequence[int],
) -> torch.Tensor:
    """The neurons that [`balanced_neurons`] chooses from.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, parts, L, N]`, of the parts that there are sums for.
        targets (`int`): For the first so many values.
        neurons (`int`): How many it is to choose per value.
        penalty (`float`): What leakage costs, above 0.
        layers (`Sequence[int]`): The layers that take part.

    Returns:
        `torch.Tensor`: Bool `[targets, L, N]`.

    Raises:
        `NeVAError`: If there are not so many neurons in the layers, or no neuron serves a value.
    """
    depth, width = samples.shape[2:]
    check_request(neurons, layers, depth, width)
    count = min(max(neurons, min(_CANDIDATES * neurons, _MAX_CANDIDATES)), len(set(layers)) * width)
    return top_neurons(balanced_scores(statistics, samples, targets, penalty, layers), count, layers)


def balanced_neurons(
    statistics: Statistics,
    samples: torch.Tensor,
    targets: int,
    neurons: int,
    penalty: float,
    layers: Sequence[int],
    own: ReplySamples | None = None,
    progress: Progress[int] = no_progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons of each value, and what is done to them.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, parts, L, N]`, of the parts that there are sums for.
        targets (`int`): For the first so many values; the others are only kept still.
        neurons (`int`): How many per value.
        penalty (`float`): What leakage costs, above 0.
        layers (`Sequence[int]`): The layers that take part.
        own ([`ReplySamples`], *optional*): Of the candidates: what is done to the values' own replies is charged as well.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Bool `[targets, L, N]`, and float32 `[targets, parts, L, N]`: shifts and
            gains in proportion to each other, 0 elsewhere.

    Raises:
        `NeVAError`: If there are not so many neurons in the layers, or no neuron serves a value.
    """
    parts, depth, width = samples.shape[1:]
    allowed = candidates(statistics, samples, targets, neurons, penalty, layers) if own is None else own.neurons
    weight = diagonal(samples, layers)
    chosen = torch.zeros(allowed.shape, dtype=torch.bool)
    edits = torch.zeros(targets, parts, depth, width)
    for target in progress(list(range(targets)), "selection"):
        index = allowed[target].flatten().nonzero()[:, 0]
        slope, others = (_picked(one, index).double() for one in constraints(statistics, target))
        # As many features as there are candidates: the work below grows with the cube of their number.
        first = max(neurons, len(index) // parts)
        if first < len(index):
            costs = _costs(weight, index, None if own is None else own.at(target, index))
            left = slope - _charged(others, others / costs, slope, penalty)
            stays = (left.square() / costs).view(parts, -1).sum(0).topk(first).indices.sort().values
            kept = _features(stays, parts, len(index))
            index, slope, others = index[stays], slope[kept], others[:, kept]
        fisher = _fisher(samples, weight, index, None if own is None else own.at(target, index))
        while True:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
            edit = _solve(inverse, slope, others, penalty)
            if len(index) <= neurons:
                break
            some = max(neurons, int(_KEPT * len(index)))
            stays = _missed(edit.view(parts, -1), inverse).topk(some).indices.sort().values
            kept = _features(stays, parts, len(index))
            index, fisher, slope, others = index[stays], fisher[kept][:, kept], slope[kept], others[:, kept]
        chosen[target].view(-1)[index] = True
        edits[target].flatten(1)[:, index] = edit.view(parts, -1).float()
    return chosen, edits


def balanced_edits(
    statistics: Statistics,
    samples: torch.Tensor,
    chosen: torch.Tensor,
    penalty: float,
    layers: Sequence[int],
    own: ReplySamples | None = None,
) -> torch.Tensor:
    """What is done to neurons that were chosen in another way.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, parts, L, N]`, of the parts that there are sums for.
        chosen (`torch.Tensor`): Bool `[targets, L, N]`, of the first so many values.
        penalty (`float`): What leakage costs, above 0.
        layers (`Sequence[int]`): The layers that take part.
        own ([`ReplySamples`], *optional*): Of the candidates: what is done to the values' own replies is charged as well.

    Returns:
        `torch.Tensor`: Float32 `[targets, parts, L, N]`, 0 outside the chosen neurons, in proportion to each other.
    """
    weight = diagonal(samples, layers)
    edits = torch.zeros(len(chosen), *samples.shape[1:])
    for target in range(len(chosen)):
        index = chosen[target].flatten().nonzero()[:, 0]
        slope, others = (_picked(one, index).double() for one in constraints(statistics, target))
        fisher = _fisher(samples, weight, index, None if own is None else own.at(target, index))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
        edit = _solve(inverse, slope, others, penalty)
        edits[target].flatten(1)[:, index] = edit.view(samples.shape[1], -1).float()
    return edits


def _picked(features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`[..., parts, L, N]` at some neurons: `[..., parts * k]`, all shifts before all gains."""
    return features.flatten(-2)[..., index].flatten(-2)


def _features(neurons: torch.Tensor, parts: int, count: int) -> torch.Tensor:
    """Where the shifts and gains of some of `count` neurons stand."""
    return torch.cat([neurons + part * count for part in range(parts)])


def _costs(weight: torch.Tensor, index: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """The diagonal of what is charged for some neurons, `[parts * k]`, float64. `own` is `[samples, parts * k]`."""
    costs = _picked(weight, index).double()
    return costs if own is None else costs + _OWN * own.double().square().mean(0)


def _fisher(
    samples: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, own: torch.Tensor | None
) -> torch.Tensor:
    """The shrunk matrix of what is charged for some neurons, `[parts * k, parts * k]`.

    It is in float64: the constraints nearly cancel in what follows.
    """
    fisher = _SHRINKAGE * _costs(weight, index, own).diag()
    for part, rows in ((1.0, _picked(samples, index)), (_OWN, own)):
        if rows is not None:
            fisher += (rows.T @ rows).double() * (part * (1 - _SHRINKAGE) / len(rows))
    return fisher


def _missed(edit: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """What leaving each neuron out costs, `[k]`: the edit is `[parts, k]`, the inverse `[parts * k, parts * k]`."""
    parts, k = edit.shape
    blocks = inverse.view(parts, k, parts, k).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    return torch.einsum("pk,kpq,qk->k", edit, torch.linalg.inv(blocks), edit)


def _solve(inverse: torch.Tensor, slope: torch.Tensor, others: torch.Tensor, penalty: float) -> torch.Tensor:
    """d from the top of the file."""
    weighted = others @ inverse
    return inverse @ slope - _charged(others, weighted, slope, penalty, onto=weighted)


def _charged(
    others: torch.Tensor, weighted: torch.Tensor, slope: torch.Tensor, penalty: float, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """`B^T l` with l from the top of the file: `others` is C, `weighted` C F^-1, and B is `onto` or C itself."""
    if len(others) == 0:
        return torch.zeros_like(slope)
    gram = weighted @ others.T
    ridge = gram.diagonal().mean() / penalty
    factors = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), weighted @ slope)
    return factors @ (others if onto is None else onto)
