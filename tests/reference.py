"""The edit written once more, slowly: forward pre-hooks that change the dense inputs of the down projections.

Nothing here shares code with `neva_hf.edit`. Every row, value and neuron is treated by itself, in float64, on an
untouched copy of the base model, so what the hooks give is the definition that the adapter is held to.

Log-probabilities of replies are written once more, too: each reply by itself behind its prompt, no cache, no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from neva_hf import NeuronMap, Scenario
from neva_hf.neuron_map import ModuleEdits
from neva_hf.prompts import format_prompt, format_reply

Row = dict[str, float]


def coefficient(neuron_map: NeuronMap, value: str, strength: float) -> float:
    negative, positive = neuron_map.config.units.get(value, [1.0, 1.0])
    return strength * (negative if strength < 0 else positive)


def needed_share(
    x: torch.Tensor, full: torch.Tensor, edits: ModuleEdits, row: int, sign: float, probability: float
) -> torch.Tensor:
    """How much of a value's whole edit `full` each token of `x` (`[tokens, k]`, edited neurons alone) needs.

    The probe's logit shall reach the one of the wanted probability, or minus that one for a negative coefficient.
    """
    assert edits.gate_weight is not None
    assert edits.gate_bias is not None
    weight, bias = edits.gate_weight[row].double(), float(edits.gate_bias[row])
    wanted = sign * math.log(probability / (1 - probability))
    shares = []
    for token, moved in zip(x, full, strict=True):
        logit, change = float(token @ weight) + bias, float(moved @ weight)
        if sign * logit >= sign * wanted:
            shares.append(0.0)
        elif sign * change <= 0:
            shares.append(1.0)
        else:
            shares.append(min(1.0, (wanted - logit) / change))
    return torch.tensor(shares, dtype=torch.float64)


def edit_row(x: torch.Tensor, neuron_map: NeuronMap, edits: ModuleEdits, strengths: Row, gate: bool) -> torch.Tensor:
    """What a map adds to the tokens `[tokens, d_ff]` of one row: `s * unit * (shift + gain * x)`, dense."""
    added = torch.zeros_like(x, dtype=torch.float64)
    index = edits.index.long()
    selected = x.double()[:, index]
    for value, strength in strengths.items():
        s = coefficient(neuron_map, value, strength)
        if s == 0:
            continue
        row = neuron_map.values.index(value)
        full = s * edits.shift[row].double().expand_as(selected)
        if edits.gain is not None:
            full = full + s * edits.gain[row].double() * selected
        if gate and edits.gate_weight is not None:
            probability = neuron_map.config.gate_probability
            full = full * needed_share(selected, full, edits, row, math.copysign(1, s), probability)[:, None]
        added[:, index] += full
    return added


@contextmanager
def edited(model: nn.Module, *maps: tuple[NeuronMap, Row | Sequence[Row]], gate: bool = True) -> Iterator[nn.Module]:
    """Edits a plain transformers model by maps at strengths, one dict for all rows or one per row.

    Beams and returned sequences repeat each row in place, so row b of a batch that grew n times belongs to b // n.
    Some models (OPT) flatten rows and tokens; the number of rows is taken from what the model was called with.
    """
    batch: list[int] = []

    def remember_batch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        batch[:] = [next(len(tensor) for tensor in given if tensor is not None)]

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0].reshape(batch[0], -1, args[0].shape[-1])
            result = x.clone()
            for neuron_map, strengths in maps:
                rows = [strengths] if isinstance(strengths, dict) else strengths
                repeats = len(x) // len(rows)
                for number in range(len(x)):
                    edits, row = neuron_map.modules[name], rows[number // repeats]
                    result[number] += edit_row(x[number], neuron_map, edits, row, gate).to(x.dtype)
            return (result.reshape(args[0].shape), *args[1:])

        return hook

    names = {name for neuron_map, _ in maps for name in neuron_map.modules}
    modules = dict(model.named_modules())
    handles = [model.register_forward_pre_hook(remember_batch, with_kwargs=True)]
    handles += [modules[name].register_forward_pre_hook(hook_for(name)) for name in sorted(names)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def log_probs(model: Any, tokenizer: Any, scenario: Scenario, system: str | None = None) -> dict[str, torch.Tensor]:
    """The log-probability of each reply of a scenario in nats per token, in float64."""
    prompt = tokenizer(format_prompt(tokenizer, scenario.question, system=system), add_special_tokens=False).input_ids
    found = {}
    for key, text in scenario.replies.items():
        reply = tokenizer(format_reply(tokenizer, text), add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0].double()
        told = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found[key] = sum(told[place, token] for place, token in enumerate(reply)) / len(reply)
    return found
