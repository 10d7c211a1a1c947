"""Leakage-aware selection: the neurons, and the shifts on them, that move one margin most and the others least.

To first order a shift d of the neurons moves the target's margin by `J.d` and the margin of another value u by `C_u.d`,
and by the second order it costs a KL divergence of `d.F.d / 2` on neutral text (sensitivity.py). The shift that gains
most for its cost, with the leakage `C d` charged, solves (ours; a ridge on the constraints of a natural gradient step)

    d = F^-1 (J - C^T l),   (C F^-1 C^T + mean(diag(C F^-1 C^T)) / penalty) l = C F^-1 J

so that a penalty of 0 leaves `F^-1 J`, and a large one puts every `C_u.d` to 0. A neuron's own part in that, with only
the diagonal of F, is its score: `(J - C^T l)^2 / F`. The neurons with the highest scores are candidates, and from them
those are dropped, some at a time, that are missed least: leaving neuron n out costs `d_n^2 / (F^-1)_nn` (the saliency of
Optimal Brain Surgeon, Hassibi and Stork 1992), so of neurons that do the same only one stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neva_hf.measure import Progress, no_progress

from .select import check_request, top_neurons
from .statistics import Statistics

# So many candidates for each neuron, of which this part stays in each round. The work grows with the cube of their number.
_CANDIDATES, _KEPT, _MAX_CANDIDATES = 6, 0.6, 6000
# Samples say little about single off-diagonal entries of F: they are halved, which also makes F invertible.
_SHRINKAGE = 0.5
# Neurons that hardly disturb neutral text would get endless shifts; F is kept above this part of its median.
_FLOOR = 0.05


def diagonal(samples: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """The diagonal of the Fisher matrix, kept away from 0.

    Args:
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, L, N]`.
        layers (`Sequence[int]`): The layers that take part.

    Returns:
        `torch.Tensor`: Float32 `[L, N]`.
    """
    square = samples.square().mean(0)
    return square + _FLOOR * square[list(layers)].median()


def constraints(statistics: Statistics, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slope of the target's margin, and those of the others with the target's reply left out.

    A margin holds a reply against n competing ones, the target's among them, so every rise of the target would read as
    a fall of the others. Left out of the competition, the margin of u has the slope `J_u + J_target / n`, up to a factor
    (for scenarios in which all values have a reply). Values that are held against their own opposite stay as they are.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        target (`int`): The row of the target.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[L, N]` and `[V - 1, L, N]`.
    """
    gradient = statistics.mean_gradient()
    rivals = (statistics.rivals / statistics.count.clamp(min=1)).float()
    share = torch.where(rivals > 0, 1 / rivals.clamp(min=1), 0.0)
    others = [row for row in range(len(statistics.values)) if row != target]
    return gradient[target], gradient[others] + share[others, None, None] * gradient[target]


def balanced_scores(
    statistics: Statistics, samples: torch.Tensor, targets: int, penalty: float, layers: Sequence[int]
) -> torch.Tensor:
    """How much each neuron serves each value, once what it does to the others is charged.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, L, N]`.
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
        slope[closed], others[:, closed] = 0.0, 0.0
        left = slope - _charged(others.flatten(1), (others / weight).flatten(1), slope.flatten(), penalty).view_as(
            slope
        )
        scores.append(left.square() / weight)
    return torch.stack(scores)


def balanced_neurons(
    statistics: Statistics,
    samples: torch.Tensor,
    targets: int,
    neurons: int,
    penalty: float,
    layers: Sequence[int],
    progress: Progress[int] = no_progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons of each value, and the shifts on them.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, L, N]`.
        targets (`int`): For the first so many values; the others are only kept still.
        neurons (`int`): How many per value.
        penalty (`float`): What leakage costs, above 0.
        layers (`Sequence[int]`): The layers that take part.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Bool `[targets, L, N]`, and float32 `[targets, L, N]`: shifts in proportion
            to each other, 0 elsewhere.

    Raises:
        `NeVAError`: If there are not so many neurons in the layers, or no neuron serves a value.
    """
    depth, width = samples.shape[1:]
    check_request(neurons, layers, depth, width)
    scores = balanced_scores(statistics, samples, targets, penalty, layers)
    candidates = max(neurons, min(_CANDIDATES * neurons, _MAX_CANDIDATES))
    allowed = top_neurons(scores, min(candidates, len(set(layers)) * width), layers)
    weight = diagonal(samples, layers).flatten()
    chosen = torch.zeros(allowed.shape, dtype=torch.bool)
    shifts = torch.zeros(allowed.shape)
    for target in progress(list(range(targets)), "selection"):
        index = allowed[target].flatten().nonzero()[:, 0]
        fisher = _fisher(samples, weight, index)
        slope, others = (one.flatten(-2)[..., index].double() for one in constraints(statistics, target))
        while True:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
            shift = _solve(inverse, slope, others, penalty)
            if len(index) <= neurons:
                break
            left = max(neurons, int(_KEPT * len(index)))
            stays = (shift.square() / inverse.diagonal()).topk(left).indices.sort().values
            index, fisher, slope, others = index[stays], fisher[stays][:, stays], slope[stays], others[:, stays]
        chosen[target].view(-1)[index] = True
        shifts[target].view(-1)[index] = shift.float()
    return chosen, shifts


def balanced_shifts(
    statistics: Statistics, samples: torch.Tensor, chosen: torch.Tensor, penalty: float, layers: Sequence[int]
) -> torch.Tensor:
    """The shifts of neurons that were chosen in another way.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, L, N]`.
        chosen (`torch.Tensor`): Bool `[targets, L, N]`, of the first so many values.
        penalty (`float`): What leakage costs, above 0.
        layers (`Sequence[int]`): The layers that take part.

    Returns:
        `torch.Tensor`: Float32 `[targets, L, N]`, 0 outside the chosen neurons, in proportion to each other.
    """
    weight = diagonal(samples, layers).flatten()
    shifts = torch.zeros(chosen.shape)
    for target in range(len(chosen)):
        index = chosen[target].flatten().nonzero()[:, 0]
        slope, others = (one.flatten(-2)[..., index].double() for one in constraints(statistics, target))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_fisher(samples, weight, index)))
        shifts[target].view(-1)[index] = _solve(inverse, slope, others, penalty).float()
    return shifts


def _fisher(samples: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The shrunk Fisher matrix of some neurons, `[k, k]`, in float64: the constraints nearly cancel in what follows."""
    picked = samples.flatten(1)[:, index]
    fisher = (picked.T @ picked).double() * ((1 - _SHRINKAGE) / len(picked))
    return fisher + _SHRINKAGE * weight[index].double().diag()


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
