"""Refinement: a few steps of constrained optimization of the shifts on neurons that are chosen already.

The shifts of each value go up the gradient of its margin at strength 1 itself, where attribution only knows the slope at
strength 0, while rises of the other values' margins are charged, and a KL divergence on neutral text beyond the target is
too. Only the sizes of the shifts change: the neurons stay, and no weight of the model is touched.

Loss of a step (ours), for value t on one scenario and one neutral text:

    -margin(t) + leakage_penalty * mean over u != t of max(0, rise of margin(u)) + kl_penalty * max(0, KL / target - 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neva_hf.dial import neva_layers
from neva_hf.edit import LayerEdit, calls
from neva_hf.layer import NeVALayer
from neva_hf.measure import EncodedScenario, Progress, contrast, encode, no_progress, reply_log_probs
from neva_hf.model import NeVAModel
from neva_hf.neuron_map import NeuronMap
from neva_hf.scenarios import Scenario


@dataclass(frozen=True)
class RefineOptions:
    """How far and how fast.

    Args:
        steps (`int`): Steps per value; each takes one scenario and one neutral text.
        learning_rate (`float`): Of Adam, on factors of the shifts, which all begin at 1.
        leakage_penalty (`float`): What a rise of the other values' margins costs.
        kl_penalty (`float`): What exceeding the target KL divergence costs, per multiple of the target.
        seed (`int`): For the order of the scenarios.
    """

    steps: int = 36
    learning_rate: float = 0.15
    leakage_penalty: float = 1.0
    kl_penalty: float = 0.2
    seed: int = 0


def refine(
    model: NeVAModel,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    texts: Sequence[str],
    *,
    target_kl: float,
    options: RefineOptions = RefineOptions(),
    progress: Progress[Any] = no_progress,
) -> NeuronMap:
    """Refines the map of a model.

    Args:
        model ([`NeVAModel`]): The base model with a calibrated map of shifts alone. It is left as it was.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): The scenarios that the map was found in.
        texts (`Sequence[str]`): Neutral texts.
        target_kl (`float`): The KL divergence that strength 1 is to cost, nats per token.
        options ([`RefineOptions`]): How far and how fast.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`NeuronMap`]: A map with the same neurons and other shifts, at positive strength 1 in the scale of the old one.
    """
    neuron_map = NeuronMap.from_model(model)
    layers = {layer.module_name: layer for layer in neva_layers(model)}
    modules = dict(neuron_map.modules)
    shifts = {name: edits.shift.clone() for name, edits in modules.items()}
    plan = [(value, step) for value in neuron_map.values for step in range(options.steps)]
    known: dict[int, torch.Tensor] = {}
    state: _Value | None = None
    for value, step in progress(plan, "refining"):
        if step == 0:
            state = _Value(model, neuron_map, layers, value, options)
        assert state is not None
        number = state.order[step % len(state.order)] % len(scenarios)
        encoded = encode(tokenizer, scenarios[number])
        if number not in known:
            with torch.no_grad(), state.dialled(None):
                known[number] = reply_log_probs(model, encoded)
        text = tokenizer(texts[step % len(texts)], return_tensors="pt")["input_ids"][:, :160].to(known[number].device)
        state.step(encoded, known[number], text, target_kl, step)
        if step == options.steps - 1:
            state.write(shifts)
    return NeuronMap(
        replace(neuron_map.config, units={}, ranges={}, measurements={}),
        {name: replace(edits, shift=shifts[name]) for name, edits in modules.items()},
    )
