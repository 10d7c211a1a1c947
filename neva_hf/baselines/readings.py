"""What the pass over the training scenarios keeps, and what methods read off it.

All are sums, whose size does not grow with the scenarios, but for `last`: a logistic regression and a principal component
need the samples themselves. They take `4 * replies * L * H` bytes: 75 MB for 1,080 replies of SmolLM2-135M, 0.6 GB for a
model of 32 layers of 4,096.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from neva_hf.measure import contrast
from neva_hf.scenarios import Scenario

# Bins of the histogram of activations: the first for everything up to the lowest edge, the others even in logarithm.
BINS, LOWEST, HIGHEST = 96, 1e-3, 1e3
# What CNA takes for a neuron that fires strongly: the share of all neurons that are the strongest at a token.
STRONGEST = 0.001


@dataclass(frozen=True)
class Pair:
    """A value's reply in a scenario, and those that it is held against, as rows of `last`."""

    own: int
    rivals: list[int]
    scenario: int


@dataclass
class Readings:
    """Of `V` values, `L` layers of hidden size `H` with `N` neurons each, and `R` replies in all.

    "Contrast" is what the value's reply gives minus the mean of what the competing replies to the same question give; a
    neuron's activation is what the down projection reads. All on the CPU.

    Args:
        values (`list[str]`): The values.
        modules (`list[str]`): The down projections, one per layer.
        blocks (`list[str]`): The decoder blocks.
        activations (`list[str]`, *optional*): The activation functions; `None` where they have no modules of their own.
        pairs (`list[list[Pair]]`): Per value.
        count (`torch.Tensor`): Float64 `[V]`, the scenarios that contrast each value.
        rivals (`torch.Tensor`): Float64 `[V]`, the competing replies in them.
        stream (`torch.Tensor`): Float64 `[V, L, H]`, sum of the contrast of the residual stream behind the block, mean
            over the reply's tokens.
        last (`torch.Tensor`): Float32 `[R, L, H]`, the residual stream behind the block at the reply's last token.
        difference (`torch.Tensor`): Float64 `[V, L, N]`, sum of the contrast of activations at the last token.
        own_sum, own_square, rival_sum, rival_square (`torch.Tensor`): Float64 `[V, L, N]`, sums of those activations and
            of their squares, in the value's replies and in the competing ones.
        strong (`torch.Tensor`): Float64 `[L, N]`, the replies at whose last token the neuron is among the strongest
            0.1% of all.
        replies (`torch.Tensor`): Float64 `[]`, how many those are.
        active (`torch.Tensor`): Float64 `[V, L, N]`, sum of the contrast of the share of tokens at which the activation
            function's output is above 0.
        histogram (`torch.Tensor`): Float32 `[L, N, BINS]`, over all replies' tokens, of the activation function's output.
    """

    values: list[str]
    modules: list[str]
    blocks: list[str]
    activations: list[str] | None
    pairs: list[list[Pair]]
    count: torch.Tensor
    rivals: torch.Tensor
    stream: torch.Tensor
    last: torch.Tensor
    difference: torch.Tensor
    own_sum: torch.Tensor
    own_square: torch.Tensor
    rival_sum: torch.Tensor
    rival_square: torch.Tensor
    strong: torch.Tensor
    replies: torch.Tensor
    active: torch.Tensor
    histogram: torch.Tensor

    @classmethod
    def zeros(
        cls,
        values: list[str],
        modules: list[str],
        blocks: list[str],
        activations: list[str] | None,
        scenarios: Sequence[Scenario],
        neurons: int,
        hidden: int,
    ) -> Readings:
        """Readings of nothing yet, with room for the replies of some scenarios."""
        count, depth = len(values), len(modules)

        def zero(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype)

        return cls(
            values=values,
            modules=modules,
            blocks=blocks,
            activations=activations,
            pairs=[list(_pairs(scenarios, value)) for value in values],
            count=zero(count),
            rivals=zero(count),
            stream=zero(count, depth, hidden),
            last=zero(sum(len(one.replies) for one in scenarios), depth, hidden, dtype=torch.float32),
            difference=zero(count, depth, neurons),
            own_sum=zero(count, depth, neurons),
            own_square=zero(count, depth, neurons),
            rival_sum=zero(count, depth, neurons),
            rival_square=zero(count, depth, neurons),
            strong=zero(depth, neurons),
            replies=zero(),
            active=zero(count, depth, neurons),
            histogram=zero(depth, neurons, BINS, dtype=torch.float32),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name; changing them changes the readings."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def mean_stream(self) -> torch.Tensor:
        """Float32 `[V, L, H]`: mean contrast of the residual stream, itself a mean over the reply's tokens."""
        return (self.stream / self.count[:, None, None].clamp(min=1)).float()

    def last_stream(self) -> torch.Tensor:
        """Float32 `[V, L, H]`: the same at the reply's last token."""
        found = torch.zeros(self.stream.shape)
        for row, pairs in enumerate(self.pairs):
            total = sum((self.last[one.own].double() - self.last[one.rivals].double().mean(0) for one in pairs), 0.0)
            found[row] = torch.as_tensor(total) / max(len(pairs), 1)
        return found

    def mean_difference(self) -> torch.Tensor:
        """Float32 `[V, L, N]`: mean contrast of activations at the last token."""
        return (self.difference / self.count[:, None, None].clamp(min=1)).float()

    def mean_active(self) -> torch.Tensor:
        """Float32 `[V, L, N]`: mean contrast of the share of active tokens."""
        return (self.active / self.count[:, None, None].clamp(min=1)).float()

    def cohens_d(self) -> torch.Tensor:
        """Float32 `[V, L, N]`: Cohen's d of activations at the last token, with the deviation pooled over both groups.

        `d = (mean own - mean rival) / s`, `s^2 = ((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2)` (Cohen 1988, 2.5).
        """
        own, rival = self.count[:, None, None].clamp(min=1), self.rivals[:, None, None].clamp(min=1)
        means = self.own_sum / own, self.rival_sum / rival
        scatter = self.own_square - own * means[0].square() + self.rival_square - rival * means[1].square()
        deviation = (scatter.clamp(min=0) / (own + rival - 2).clamp(min=1)).sqrt()
        return torch.where(deviation > 1e-12, (means[0] - means[1]) / deviation.clamp(min=1e-12), 0.0).float()

    def quantile(self, share: float) -> torch.Tensor:
        """Float32 `[L, N]`: a quantile of the activation function's output over the replies' tokens.

        Read off the histogram, on a line in logarithms inside a bin; 0 where it is not above the lowest edge.
        """
        counts = self.histogram.double()
        reached = counts.cumsum(-1)
        wanted = share * reached[..., -1:]
        position = (reached < wanted).sum(-1, keepdim=True).clamp(max=BINS - 1)
        here = counts.gather(-1, position)
        below = reached.gather(-1, position) - here
        inside = ((wanted - below) / here.clamp(min=1)).clamp(0, 1)
        step = math.log(HIGHEST / LOWEST) / (BINS - 1)
        found = LOWEST * ((position - 1 + inside) * step).exp()
        return torch.where(position > 0, found, 0.0)[..., 0].float()


def bins(x: torch.Tensor) -> torch.Tensor:
    """The bin of the histogram, int64, that each number falls into."""
    steps = (x.clamp(min=LOWEST) / LOWEST).log() * ((BINS - 1) / math.log(HIGHEST / LOWEST))
    return torch.where(x > LOWEST, 1 + steps.floor().clamp(max=BINS - 2), 0).long()


def _pairs(scenarios: Sequence[Scenario], value: str) -> Iterator[Pair]:
    start = 0
    for number, scenario in enumerate(scenarios):
        keys = list(scenario.replies)
        weights = contrast(keys, value)
        if weights is not None:
            rivals = [start + row for row, weight in enumerate(weights) if weight < 0]
            yield Pair(start + weights.index(1.0), rivals, number)
        start += len(keys)
