"""What one pass over scenarios keeps: sums whose size does not grow with the number of scenarios.

Sums of two passes add up to the sums of both, so several processes can share the scenarios, and a pass can be cut and
taken up again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from neva_hf.errors import NeVAError


@dataclass
class Statistics:
    """Sums over scenarios, of `V` values, `L` layers with `N` neurons each. Float64 on the CPU, but for `scatter`.

    What the value probes need is kept only where it was asked for, since it is most of the memory by far: the bytes are
    `8 * V * L * H + 4 * L * H^2` with `H` the hidden size (40 MB for 30 layers of 576, 2.1 GB for 32 layers of 4096), next
    to `8 * (3 * V + 3) * L * N` of all the others, and `8 * V * L * N` for gains.

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
        gain_gradient (`torch.Tensor`, *optional*): `[V, L, N]`: like `gradient`, with respect to a gain: a multiple of the
            neuron's own activation that is added to it at every token.
        written (`torch.Tensor`, *optional*): `[V, L, H]`: the sum of the contrast of what the down projection writes in
            the mean over a reply's tokens.
        scatter (`torch.Tensor`, *optional*): Float32 `[L, H, H]`: the sum over scenarios of the covariance, between
            replies, of that mean. (Half the memory, and no digit that a probe with shrinkage would miss.)
        logit_per_unit (`torch.Tensor`, *optional*): Float32 `[V, L, N]`: what a unit of each neuron adds to the logit of
            the value's probe. No sum: [`with_logits_per_unit`] reads it off the model when a pass is over.
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
    gain_gradient: torch.Tensor | None = None
    written: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    logit_per_unit: torch.Tensor | None = field(default=None, metadata={"sum": False})

    @classmethod
    def zeros(
        cls, values: list[str], modules: list[str], neurons: int, hidden: int | None = None, gains: bool = False
    ) -> Statistics:
        """Statistics of no scenario.

        Args:
            values (`list[str]`): The values.
            modules (`list[str]`): The down projections, one per layer.
            neurons (`int`): How many inputs each has.
            hidden (`int`, *optional*): How many outputs each has, to keep what value probes need; `None` keeps none of it.
            gains (`bool`): Whether to keep what gains need.

        Returns:
            [`Statistics`]: Zeros.
        """
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
            gain_gradient=zero(*values_shape) if gains else None,
            written=None if hidden is None else zero(len(values), len(modules), hidden),
            scatter=None if hidden is None else torch.zeros(len(modules), hidden, hidden),
        )

    def add(self, other: Statistics) -> None:
        """Adds the sums of another pass over other scenarios, in place.

        Raises:
            `NeVAError`: If they are of other values or another model, or one of the two has nothing for probes or gains.
        """
        if (self.values, self.modules) != (other.values, other.modules):
            raise NeVAError("Only statistics of the same values in the same model can be added up.")
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            raise NeVAError(
                "Statistics with the sums for value probes or gains and statistics without them cannot be added up."
            )
        for name, tensor in mine.items():
            tensor += theirs[name]
        # (it belongs to probes of the sums as they were)
        self.logit_per_unit = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name; changing them changes the statistics."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata.get("sum", True)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def mean_gradient(self) -> torch.Tensor:
        """`[V, L, N]` float32: derivative of the margin with respect to a shift, in nats per token."""
        return (self.gradient / self.count.clamp(min=1)[:, None, None]).float()

    def mean_gradients(self) -> torch.Tensor:
        """`[V, parts, L, N]` float32: [`mean_gradient`], and behind it that with respect to a gain where it is kept."""
        kept = [self.gradient] if self.gain_gradient is None else [self.gradient, self.gain_gradient]
        return (torch.stack(kept, dim=1) / self.count.clamp(min=1)[:, None, None, None]).float()

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
