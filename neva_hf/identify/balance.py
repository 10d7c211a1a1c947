"""Leakage-aware selection: the neurons, and the shifts on them, that move one margin most and the others least.

To first order a shift d of the neurons moves the target's margin by `J.d` and the margin of another value u by `C_u.d`,
and by the second order it costs a KL divergence of `d.F.d / 2` on neutral text (sensitivity.py). The shift that gains
most for its cost, with the leakage `C d` charged, solves (ours; a ridge on the constraints of a natural gradient step)

    d = F^-1 (J - C^T l),   (C F^-1 C^T + mean(diag(C F^-1 C^T)) / penalty) l = C F^-1 J

so that a penalty of 0 leaves `F^-1 J`, and a large one puts every `C_u.d` to 0. A neuron's own part in that, with only
the diagonal of F, is its score: `(J - C^T l)^2 / F`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .statistics import Statistics

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


def balanced_shifts(
    statistics: Statistics, samples: torch.Tensor, chosen: torch.Tensor, penalty: float, layers: Sequence[int]
) -> torch.Tensor:
    """The shifts of the chosen neurons.

    Args:
        statistics ([`Statistics`]): Sums of a pass over scenarios.
        samples (`torch.Tensor`): From [`fisher_samples`], `[samples, L, N]`.
        chosen (`torch.Tensor`): Bool `[targets, L, N]`, of the first so many values.
        penalty (`float`): What leakage costs, above 0.
        layers (`Sequence[int]`): The layers that take part.

    Returns:
        `torch.Tensor`: Float32 `[targets, L, N]`, 0 outside the chosen neurons, in proportion to each other.
    """
    # (the constraints nearly cancel, which float32 does not survive)
    weight = diagonal(samples, layers).flatten().double()
    shifts = torch.zeros(chosen.shape)
    for target in range(len(chosen)):
        index = chosen[target].flatten().nonzero()[:, 0]
        picked = samples.flatten(1)[:, index].double()
        fisher = (1 - _SHRINKAGE) * (picked.T @ picked / len(picked)) + _SHRINKAGE * weight[index].diag()
        slope, others = (one.flatten(-2)[..., index].double() for one in constraints(statistics, target))
        solved = torch.linalg.solve(fisher, torch.cat([slope[None], others]).T).T
        charged = _charged(others, solved[1:], slope, penalty, onto=solved[1:])
        shifts[target].view(-1)[index] = (solved[0] - charged).float()
    return shifts


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
