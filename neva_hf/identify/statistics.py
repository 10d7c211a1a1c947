"""What one pass over scenarios keeps: sums whose size does not grow with the number of scenarios.

Sums of two passes add up to the sums of both, so several processes can share the scenarios, and a pass can be cut and
taken up again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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
        activity (`torch.Tensor`): `[V, L, N]`: the sum of the same contrast of the share of tokens at which it is above 0.
        spread (`torch.Tensor`): `[L, N]`: the sum over scenarios of the variance, between replies, of its mean activation.
        count (`torch.Tensor`): `[V]`: in how many scenarios the value took part.
        rivals (`torch.Tensor`): `[V]`: the sum over those scenarios of how many other values' replies its reply was held
            against (0 where it was held against its own opposite).
        mean (`torch.Tensor`): `[L, N]`: sum over replies' tokens of the activation.
        square (`torch.Tensor`): `[L, N]`: sum over replies' tokens of its square.
        tokens (`torch.Tensor`): `[]`: the number of those tokens.
        scenarios (`torch.Tensor`): `[]`: the number of scenarios.
    """

    values: list[str]
    modules: list[str]
    gradient: torch.Tensor
    difference: torch.Tensor
    activity: torch.Tensor
    spread: torch.Tensor
    count: torch.Tensor
    rivals: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    tokens: torch.Tensor
    scenarios: torch.Tensor

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
            activity=zero(*values_shape),
            spread=zero(*shape),
            count=zero(len(values)),
            rivals=zero(len(values)),
            mean=zero(*shape),
            square=zero(*shape),
            tokens=zero(),
            scenarios=zero(),
        )

    def add(self, other: Statistics) -> None:
        """Adds the sums of another pass over other scenarios, in place.

        Raises:
            `NeVAError`: If they are of other values or another model.
        """
        if (self.values, self.modules) != (other.values, other.modules):
            raise NeVAError("Only statistics of the same values in the same model can be added up.")
        theirs = other.tensors()
        for name, tensor in self.tensors().items():
            tensor += theirs[name]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name; changing them changes the statistics."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def mean_gradient(self) -> torch.Tensor:
        """`[V, L, N]` float32: derivative of the margin with respect to a shift, in nats per token."""
        return (self.gradient / self.count.clamp(min=1)[:, None, None]).float()

    def mean_difference(self) -> torch.Tensor:
        """`[V, L, N]` float32: mean activation in the value's replies minus that in the competing ones."""
        return (self.difference / self.count.clamp(min=1)[:, None, None]).float()

    def mean_activity(self) -> torch.Tensor:
        """`[V, L, N]` float32: share of active tokens in the value's replies minus that in the competing ones."""
        return (self.activity / self.count.clamp(min=1)[:, None, None]).float()

    def deviation(self) -> torch.Tensor:
        """`[L, N]` float32: standard deviation, between replies to the same question, of the mean activation."""
        return (self.spread / self.scenarios.clamp(min=1)).sqrt().float()

    def variance(self) -> torch.Tensor:
        """`[L, N]` float32: variance of the activations over the replies' tokens."""
        mean = self.mean / self.tokens.clamp(min=1)
        return (self.square / self.tokens.clamp(min=1) - mean.square()).clamp(min=0).float()
