"""ConVA: value probes of the residual stream, and the least shift along them that brings a prompt to a probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from neva_hf.errors import NeVAError

from .hooks import Call, Change, Edit, per_row, steering
from .method import At, Evidence, Method
from .readings import Readings

PROBABILITY = 0.99
ACCURACY = 0.9
LEFT_OUT = 5
# Every n-th scenario is kept back from a probe, to tell its accuracy.
_KEPT_BACK = 5


@dataclass(frozen=True)
class StreamProbes:
    """Logistic probes of the residual stream: the logit of a value is `weight . e + bias`.

    Args:
        weight (`torch.Tensor`): Float32 `[V, L, H]`.
        bias (`torch.Tensor`): Float32 `[V, L]`.
        accuracy (`torch.Tensor`): Float32 `[V, L]`, balanced, on scenarios that were kept back.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    accuracy: torch.Tensor


def conva(evidence: Evidence, *, probability: float = PROBABILITY) -> Method:
    """Controlled Value Vector Activation (Jin et al. 2025, arXiv 2507.11316, section 3).

    Per layer and value a logistic regression with L2 penalty on the residual stream e at the last token, w . e + b; the
    value vector is v = w / |w|. With e the prompt's last token, `max(0, logit(P0) - (w . e + b)) / (w . v)` times v is
    added at all positions: the least shift along v that brings the prompt to the probability P0, and none where it is
    there already. It is computed once per prompt, and used for all that follows from the same cache. Layers whose probe is
    right in more than 90% of the cases take part, without the last five.

    What is ours, so that it can be compared: the contrast is that of the other methods, with one reply of the value
    against several competing ones, hence balanced class weights and balanced accuracy. The shift is multiplied by the
    size of the strength, so that its damage can be set; a negative strength brings the prompt to 1 - P0. The second gate
    of the paper (whether a prompt is about the value at all) is left out: all our questions are, and on neutral text it
    would be shut. A value without a single good layer takes its best one.

    Args:
        evidence ([`Evidence`]): What to learn from.
        probability (`float`): P0, between 0.5 and 1.

    Returns:
        [`Method`]: Strength 1 is the shift of the paper.

    Raises:
        `NeVAError`: If scikit-learn is not there, the probability cannot be used, or a value is not contrasted.
    """
    if not 0.5 <= probability < 1:
        raise NeVAError(f"`probability` must be from 0.5 to below 1, got {probability}.")
    readings = evidence.readings
    probes = fit_probes(readings)
    used = used_layers(probes.accuracy)
    at = gated(evidence.model, readings.values, readings.blocks, probes, used, probability)
    layers = {value: row.nonzero()[:, 0].tolist() for value, row in zip(readings.values, used, strict=True)}
    return Method("ConVA", readings.values, at, notes={"layers": layers, "probability": probability})


def fit_probes(readings: Readings, layers: Sequence[int] | None = None) -> StreamProbes:
    """Trains the probes.

    Args:
        readings ([`Readings`]): What the pass gave.
        layers (`Sequence[int]`, *optional*): Which; all but the last five by default.

    Returns:
        [`StreamProbes`]: Zeros in layers that were not asked for.

    Raises:
        `NeVAError`: If scikit-learn is not there.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
    except ImportError as error:
        raise NeVAError("ConVA's probes need scikit-learn: pip install 'neva-hf[scenarios]'.") from error
    depth = len(readings.blocks)
    found = StreamProbes(
        torch.zeros(readings.stream.shape),
        torch.zeros(len(readings.values), depth),
        torch.zeros(len(readings.values), depth),
    )
    wanted = list(layers) if layers is not None else list(range(max(depth - LEFT_OUT, 1)))
    for value, pairs in enumerate(readings.pairs):
        rows = torch.tensor([row for pair in pairs for row in (pair.own, *pair.rivals)])
        told = torch.tensor([row == pair.own for pair in pairs for row in (pair.own, *pair.rivals)]).numpy()
        numbers = torch.tensor([at for at, pair in enumerate(pairs) for _ in (pair.own, *pair.rivals)])
        kept_back = (numbers % _KEPT_BACK == _KEPT_BACK - 1).numpy()
        tested = kept_back if kept_back.any() else ~kept_back
        for layer in wanted:
            states = readings.last[rows, layer]
            # One scale for all dimensions keeps directions as they are, and the solver steady.
            scale = float(states.square().mean().sqrt().clamp(min=1e-6))
            x = (states / scale).double().numpy()
            # (a few dimensions of a residual stream are much larger than all others, so some need many steps)
            probe = LogisticRegression(class_weight="balanced", max_iter=5000)
            probe.fit(x[~kept_back], told[~kept_back])
            found.weight[value, layer] = torch.from_numpy(probe.coef_[0]).float() / scale
            found.bias[value, layer] = float(probe.intercept_[0])
            found.accuracy[value, layer] = balanced_accuracy_score(told[tested], probe.predict(x[tested]))
    return found


def used_layers(accuracy: torch.Tensor) -> torch.Tensor:
    """Which layers take part, bool `[V, L]`: good ones without the last five, or the best one where none is good."""
    early = torch.zeros(accuracy.shape, dtype=torch.bool)
    early[:, : max(accuracy.shape[1] - LEFT_OUT, 1)] = True
    used = (accuracy > ACCURACY) & early
    best = torch.nn.functional.one_hot(accuracy.where(early, -1.0).argmax(1), accuracy.shape[1]).bool()
    return torch.where(used.any(1, keepdim=True), used, best)


def gated(
    model: nn.Module,
    values: Sequence[str],
    blocks: Sequence[str],
    probes: StreamProbes,
    used: torch.Tensor,
    probability: float = PROBABILITY,
) -> At:
    """Dials that add the closed-form shift. See [`conva`].

    Args:
        model (`nn.Module`): The model.
        values (`Sequence[str]`): The values.
        blocks (`Sequence[str]`): The decoder blocks.
        probes ([`StreamProbes`]): The probes.
        used (`torch.Tensor`): Bool `[V, L]`.
        probability (`float`): P0.

    Returns:
        `At`: For a [`Method`].
    """
    wanted = math.log(probability / (1 - probability))

    def change(layer: int, table: torch.Tensor) -> Change:
        weight = probes.weight[:, layer] * used[:, layer, None]
        bias, length = probes.bias[:, layer], weight.norm(dim=1).clamp(min=1e-12)
        direction = weight / length[:, None]
        shift = torch.zeros(0)

        def changed(x: torch.Tensor, call: Call) -> torch.Tensor:
            nonlocal shift
            if call.begins or not shift.numel():
                rows = torch.arange(x.shape[0], device=x.device)
                last = x.shape[1] - 1 if call.last is None else call.last.to(x.device)
                here = x[rows, last].float()
                logit = here @ weight.T.to(here) + bias.to(here)
                strength = per_row(table, here[:, None])[:, 0]
                gap = torch.where(strength > 0, (wanted - logit).clamp(min=0), -(wanted + logit).clamp(min=0))
                shift = (strength.abs() * gap / length.to(here)) @ direction.to(here)
            if not call.begins and call.origin is not None:
                return x + shift[call.origin][:, None].to(x)
            return x + per_row(shift, x)

        return changed

    def make(table: torch.Tensor) -> list[Edit]:
        dialled = (table != 0).any(0)
        return [Edit(block, change(at, table)) for at, block in enumerate(blocks) if bool(used[dialled, at].any())]

    return steering(model, values, make)
