"""Gates: per value and module, a probe of the edited neurons that tells whether a token lives by the value already.

The edit reads a probe's logit `z = w.x + b` at every token, and goes only as far as z needs to reach the logit of
`gate_probability` (of its complement for negative strengths; DESIGN section 6, `_gate` in edit.py). So z must be high
where the value is there: it is learned from the tokens of the value's replies against those of the competing ones.

Per value and module, with the means m1 and m0 of the two classes and S the mean of their covariances over tokens

    w = ((1 - g) S + g diag(S))^-1 (m1 - m0),   b = -w.(m1 + m0) / 2

(the linear discriminant with shrinkage g towards the diagonal, since variances of neurons differ by orders of magnitude;
Friedman 1989). For normal classes of equal covariance it is the log-odds themselves at even odds, so its logit needs no
further scale. Unlike in the scores, S holds what differs between questions: a gate does not know the question's mean.

Edits and gates agree in direction where `w.shift > 0`. For shifts along the activation difference that holds as far as
the mean over tokens goes with that over replies. Where it does not (shifts chosen for low leakage may go against it), no
fraction of the edit brings z up, and the whole edit is used wherever z is not there yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import check_base
from neva_hf.dial import neva_layers
from neva_hf.errors import NeVAError
from neva_hf.measure import Progress, contrast, no_progress, reply_log_probs
from neva_hf.neuron_map import ModuleEdits, NeuronMap
from neva_hf.projection import layer_sizes
from neva_hf.scenarios import Scenario, scenarios_hash

from .collect import encode_replies, left_as_it_was
from .parallel import add_up, share

# A few neurons against thousands of tokens: little is needed.
_SHRINKAGE = 0.1


@dataclass(frozen=True)
class GateSums:
    """Sums over tokens of one value in one module. Class 0 are the competing replies' tokens, class 1 the value's own.

    Args:
        places (`torch.Tensor`): Int64 `[k]`: which of the module's edited neurons the value edits.
        count (`torch.Tensor`): Float64 `[2]`: tokens.
        first (`torch.Tensor`): Float64 `[2, k]`: sums of their activations.
        second (`torch.Tensor`): Float64 `[2, k, k]`: sums of products of two neurons' activations.
    """

    places: torch.Tensor
    count: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def zeros(cls, places: torch.Tensor) -> GateSums:
        """Sums of no token."""
        k = len(places)
        made = [torch.zeros(size, dtype=torch.float64) for size in ((2,), (2, k), (2, k, k))]
        return cls(places, *made)

    def add(self, x: torch.Tensor, own: bool) -> None:
        """Adds tokens of one class.

        Args:
            x (`torch.Tensor`): Float64 `[tokens, neurons of the module]`.
            own (`bool`): Whether they are of the value's reply.
        """
        mine = x[:, self.places]
        self.count[int(own)] += len(mine)
        self.first[int(own)] += mine.sum(0)
        self.second[int(own)] += mine.T @ mine

    def discriminant(self, shrinkage: float = _SHRINKAGE) -> tuple[torch.Tensor, torch.Tensor]:
        """The probe, see the top of the file.

        Args:
            shrinkage (`float`): How far the covariance is taken to its diagonal, 0 to 1.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: w `[k]` in logits per unit of activation, and b `[]`; float64.
        """
        mean = self.first / self.count[:, None]
        within = (self.second / self.count[:, None, None] - mean[:, :, None] * mean[:, None, :]).mean(0)
        variance = within.diagonal().clamp(min=0)
        # Dead neurons have no variance and get no weight, since they have no difference either.
        floor = max(1e-6 * float(variance.mean()), 1e-30)
        shrunk = (1 - shrinkage) * within + (shrinkage * variance + floor).diag()
        weight = torch.linalg.solve(shrunk, mean[1] - mean[0])
        return weight, -(weight @ mean.mean(0))


def train_gates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    neuron_map: NeuronMap,
    scenarios: Sequence[Scenario],
    *,
    probability: float | None = None,
    progress: Progress[Scenario] = no_progress,
) -> NeuronMap:
    """Gives a neuron map gates, learned from scenarios in one pass.

    Kept are sums alone, of the edited neurons: with k of them for a value in a module, `16 * (k^2 + k + 1)` bytes, however
    many scenarios there are. Under `accelerate launch` the processes share the scenarios, and all end with the same gates.

    Args:
        model (`nn.Module`): The map's base model, without adapters. It is not changed.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        neuron_map ([`NeuronMap`]): The map, calibrated: gates that it has are replaced, but units and ranges stay those of
            the edit in full, which gates only cut. (A gated edit does not grow beyond what its gates ask for, so there may
            be no strength at which it costs what calibration looks for.)
        scenarios (`Sequence[Scenario]`): What to learn from: training scenarios, those that the neurons were found in.
        probability (`float`, *optional*): What gates reach for, the `gate_probability` of the config; `None` keeps the
            map's. A few neurons of one layer tell little of a single token, so their probes seldom leave the middle: at
            0.9 hardly any gate closes, near 0.5 many do.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`NeuronMap`]: The same edits with `gate_weight` `[V, k]` (0 at neurons that the value does not edit) and
        `gate_bias` `[V]` in every module, float32, and `use_gate` in its config.

    Raises:
        `NeVAError`: If the map does not fit the model, the model has a map on it, no scenario contrasts one of the
            values, a reply is a single token, or the probability is out of the config's bounds.

    Example:

    ```py
    >>> from neva_hf.identify import train_gates
    >>> gated = train_gates(model, tokenizer, neuron_map, load_scenarios())  # doctest: +SKIP
    >>> gated.apply_to(model).generate(**inputs, strengths={"benevolence": 2.0})  # doctest: +SKIP
    ```
    """
    if neva_layers(model):
        raise NeVAError("The model has a neuron map loaded: train gates on its base model (model.unload()).")
    check_base(model, neuron_map.config.base, list(neuron_map.modules))
    modules = dict(model.named_modules())
    for name, edits in neuron_map.modules.items():
        if int(edits.index.max()) >= layer_sizes(modules[name])[0]:
            raise NeVAError(
                f"The map edits neuron {int(edits.index.max())} of {name!r}, which the model does not have."
            )
    unheard = [
        value for value in neuron_map.values if not any(contrast(list(one.replies), value) for one in scenarios)
    ]
    if unheard:
        raise NeVAError(
            f"No scenario contrasts {', '.join(unheard)} with another reply, so there is nothing to learn a gate from: "
            "give scenarios with replies of every value of the map, or cut the map down with `select`."
        )
    sums = {name: [GateSums.zeros(places) for places in _edited(edits)] for name, edits in neuron_map.modules.items()}
    watched = {name: (modules[name], edits.index) for name, edits in neuron_map.modules.items()}
    # (evaluation mode, or dropout would blur what is learned)
    with left_as_it_was(model), _watching(watched) as seen, torch.no_grad():
        model.eval()
        for scenario in progress(share(scenarios), "gates"):
            encoded = encode_replies(tokenizer, scenario)
            weights = [contrast(encoded.keys, value) for value in neuron_map.values]
            if not any(weights):
                continue
            reply_log_probs(model, encoded)
            # The last token of a reply is told by the one before it and runs through nothing itself.
            mask = encoded.mask[:, 1:] > 0
            tables = [torch.zeros(len(mask)) if row is None else torch.tensor(row) for row in weights]
            classes = [(mask & (row < 0)[:, None], mask & (row > 0)[:, None]) for row in tables]
            for name, of_values in sums.items():
                x = seen[name].reshape(*mask.shape, -1).double()
                for one, (others, own) in zip(of_values, classes, strict=True):
                    one.add(x[others], own=False)
                    one.add(x[own], own=True)
    add_up(
        [tensor for of_values in sums.values() for one in of_values for tensor in (one.count, one.first, one.second)]
    )
    gated = {name: _with_gates(edits, sums[name]) for name, edits in neuron_map.modules.items()}
    told = {"scenarios": len(scenarios), "scenarios_sha256": scenarios_hash(scenarios), "shrinkage": _SHRINKAGE}
    config = replace(
        neuron_map.config,
        use_gate=True,
        gate_probability=neuron_map.config.gate_probability if probability is None else probability,
        provenance={**neuron_map.config.provenance, "gates": told},
    )
    return NeuronMap(config, gated)


def _edited(edits: ModuleEdits) -> list[torch.Tensor]:
    """Per value, which of a module's neurons it edits."""
    touched = edits.shift != 0
    if edits.gain is not None:
        touched = touched | (edits.gain != 0)
    return [row.nonzero()[:, 0] for row in touched]


def _with_gates(edits: ModuleEdits, sums: Sequence[GateSums]) -> ModuleEdits:
    weight, bias = torch.zeros_like(edits.shift), torch.zeros(len(sums))
    for row, one in enumerate(sums):
        if len(one.places):
            found, offset = one.discriminant()
            weight[row, one.places], bias[row] = found.float(), offset.float()
    return replace(edits, gate_weight=weight, gate_bias=bias)


@contextmanager
def _watching(modules: Mapping[str, tuple[nn.Module, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The given inputs of some modules in their latest call, in float32 on the CPU.

    A scenario's prompt runs before its replies, so after it the latest call is that of the replies.
    """
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str, index: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        seen[name] = x.detach().index_select(-1, index.to(x.device, torch.int64)).float().cpu()

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name, index=index: hook(name, index, inputs))
        for name, (module, index) in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
