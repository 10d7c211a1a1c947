"""Baselines on tiny models: evidence, methods of every kind, and slow computations that they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tiny import SCENARIOS, TEXTS, VALUES, tiny_reader, tiny_tokenizer
from transformers import PreTrainedModel

from neva_hf import Scenario
from neva_hf.architectures import decoder_blocks, find_down_projections
from neva_hf.baselines import METHODS, Evidence, Method
from neva_hf.measure import encode

SCALABLE = [name for name in METHODS if name != "System prompt"]

# Enough of them, with enough words of each value, for a probe to learn something.
MANY = [
    *SCENARIOS,
    Scenario("Who?", {"power": "I lead them all", "security": "a safe and calm home", "benevolence": "we help them"}),
    Scenario(
        "How?", {"power": "I take the top", "security": "stay safe at home", "benevolence": "with a friend of us"}
    ),
    Scenario(
        "When?", {"power": "I want it to lead", "security": "safe now", "benevolence": "as they need us, a friend"}
    ),
]


def evidence(model: PreTrainedModel | None = None, **options: Any) -> Evidence:
    given = {"values": VALUES, "train": MANY, "dev": SCENARIOS[:2], "texts": TEXTS, **options}
    return Evidence(model or tiny_reader(), tiny_tokenizer(), **given)


def ids(rows: int = 3, tokens: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def logits(model: torch.nn.Module, given: torch.Tensor, method: Method | None = None, *rows: dict[str, float]) -> Any:
    with torch.no_grad():
        if method is None:
            return model(input_ids=given, use_cache=False).logits
        with method.at(list(rows)):
            return model(input_ids=given, use_cache=False).logits


@contextmanager
def rewritten(
    module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], at_input: bool
) -> Iterator[None]:
    """A module whose first input or output is changed, by a hook of the test's own."""

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    def after(_: Any, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(before) if at_input else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def slow_states(model: PreTrainedModel, scenario: Scenario, key: str) -> dict[str, torch.Tensor]:
    """One reply by itself, without a cache: `streams` and `inputs`, `[L, reply tokens, features]`, and `gates`."""
    encoded = encode(tiny_tokenizer(), scenario)
    row = encoded.keys.index(key)
    length, prompt = int(encoded.mask[row].sum()), encoded.prompt.shape[1]
    text = torch.cat([encoded.prompt[0], encoded.replies[row, :length]])[None]
    seen: dict[str, list[torch.Tensor]] = {"streams": [], "inputs": [], "gates": []}

    def keep(where: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x
        seen[where].append(x.detach().reshape(text.shape[1], -1)[prompt:].double())

    handles = []
    for block in decoder_blocks(model)[1]:
        handles.append(block.register_forward_hook(lambda _, __, output: keep("streams", output)))
        gate = next(
            (m for n, m in block.named_modules() if n.endswith(("act_fn", "activation_fn", ".act", "gelu_impl")))
        )
        handles.append(gate.register_forward_hook(lambda _, __, output: keep("gates", output)))
    for module in find_down_projections(model).values():
        handles.append(module.register_forward_pre_hook(lambda _, args: keep("inputs", args)))
    try:
        with torch.no_grad():
            model(input_ids=text, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(layers) for name, layers in seen.items()}


def slow_contrast(
    model: PreTrainedModel,
    scenarios: Sequence[Scenario],
    value: str,
    read: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> torch.Tensor:
    """The mean over scenarios of what a value's reply gives minus the mean of what the others give."""
    found = []
    for scenario in scenarios:
        if value in scenario.replies:
            others = [read(slow_states(model, scenario, key)) for key in scenario.replies if key != value]
            found.append(read(slow_states(model, scenario, value)) - torch.stack(others).mean(0))
    return torch.stack(found).mean(0)
