"""What one pass over scenarios keeps: sums whose size does not grow with the number of scenarios.

Sums of two passes add up to the sums of both, so several processes can share the scenarios, and a pass can be cut and
taken up again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neva_hf.errors import NeVAError


@dataclass
class Statistics:
    """Sums over scenarios, of `V` values, `L` layers with `N` neurons each. All float64 on the CPU.

    Args:
        values (`list[str]`): The values.
        modules (`list[str]`): The down projections, one per layer.
        gradient (`torch.Tensor`): `[V, L, N]`: per value the sum over scenarios of the derivative of its margin with
            respect to a constant shift of the neuron over the replies' tokens.
        difference (`torch.Tensor`): `[V, L, N]`: the sum of the same contrast of the neuron's mean activations.
        count (`torch.Tensor`): `[V]`: in how many scenarios the value took part.
        rivals (`torch.Tensor`): `[V]`: the sum over those scenarios of how many other values' replies its reply was held
            against (0 where it was held against its own opposite).
        mean (`torch.Tensor`): `[L, N]`: sum over replies' tokens of the activation.
        square (`torch.Tensor`): `[L, N]`: sum over replies' tokens of its square.
        tokens (`float`): The number of those tokens.
    """

    values: list[str]
    modules: list[str]
    gradient: torch.Tensor
    difference: torch.Tensor
    count: torch.Tensor
    rivals: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    tokens: float = 0.0

    @classmethod
    def zeros(cls, values: list[str], modules: list[str], neurons: int) -> Statistics:
        """Statistics of no scenario."""
        values_shape, shape = (len(values), len(modules), neurons), (len(modules), neurons)

        def zero(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64)

        return cls(
            values=values,
            modules=modules,
            gradient=zero(*values_shape),
            difference=zero(*values_shape),
            count=zero(len(values)),
            rivals=zero(len(values)),
            mean=zero(*shape),
            square=zero(*shape),
        )

    def add(self, other: Statistics) -> None:
        """Adds the sums of another pass over other scenarios, in place.

        Raises:
            `NeVAError`: If they are of other values or another model.
        """
        if (self.values, self.modules) != (other.values, other.modules):
            raise NeVAError("Only statistics of the same values in the same model can be added up.")
        self.gradient += other.gradient
        self.difference += other.difference
        self.count += other.count
        self.rivals += other.rivals
        self.mean += other.mean
        self.square += other.square
        self.tokens += other.tokens

    def mean_gradient(self) -> torch.Tensor:
        """`[V, L, N]` float32: derivative of the margin with respect to a shift, in nats per token."""
        return (self.gradient / self.count.clamp(min=1)[:, None, None]).float()

    def mean_difference(self) -> torch.Tensor:
        """`[V, L, N]` float32: mean activation in the value's replies minus that in the competing ones."""
        return (self.difference / self.count.clamp(min=1)[:, None, None]).float()

    def variance(self) -> torch.Tensor:
        """`[L, N]` float32: variance of the activations over the replies' tokens."""
        mean = self.mean / max(self.tokens, 1)
        return (self.square / max(self.tokens, 1) - mean.square()).clamp(min=0).float()
