"""One pass over the training scenarios, for all methods together.

A scenario's prompt is run once; all its replies go on from its cache in one batch. No gradients: what methods need of the
residual stream, of the inputs of the down projections and of the activation functions is read by hooks on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from neva_hf.architectures import decoder_blocks, find_down_projections, text_config
from neva_hf.errors import NeVAError
from neva_hf.identify.checkpoint import read_checkpoint, write_checkpoint
from neva_hf.identify.parallel import add_up, processes, share
from neva_hf.measure import EncodedScenario, contrast, encode
from neva_hf.projection import layer_sizes
from neva_hf.scenarios import scenarios_hash

from .activations import find_activations
from .hooks import neutral
from .method import Evidence
from .readings import STRONGEST, Readings, bins

_CHECKPOINT_EVERY = 20


@dataclass
class _Seen:
    """What the hooks saw of one scenario's replies, `[replies, tokens, features]` per layer; nothing when not open."""

    open: bool = False
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    activated: dict[int, torch.Tensor] = field(default_factory=dict)


def read(evidence: Evidence) -> Readings:
    """Runs the pass.

    Args:
        evidence ([`Evidence`]): Its training scenarios are read; `checkpoint` and `progress` are used.

    Returns:
        [`Readings`]: What was seen.

    Raises:
        `NeVAError`: If no scenario contrasts one of the values, or the model's layers differ in size.
    """
    model, scenarios, values = evidence.model, list(evidence.train), list(evidence.values)
    unheard = [value for value in values if not any(contrast(list(one.replies), value) for one in scenarios)]
    if unheard or not values:
        raise NeVAError(
            f"No training scenario contrasts {', '.join(unheard) or 'any value'} with another reply: give scenarios with "
            "replies of each value beside others."
        )
    found = _empty(evidence)
    starts = [0]
    for scenario in scenarios:
        starts.append(starts[-1] + len(scenario.replies))
    mine = share(list(range(len(scenarios))))
    path, key, done = None, "", 0
    if evidence.checkpoint is not None:
        path = evidence.checkpoint.with_name(f"{evidence.checkpoint.name}.{processes()[0]}")
        agreed = ["baselines", str(getattr(model, "name_or_path", "")), scenarios_hash(scenarios)]
        key = json.dumps([*agreed, values, found.modules, list(processes())])
        done = read_checkpoint(path, found.tensors(), key)
    training = model.training
    try:
        with torch.inference_mode(), neutral(model), _watched(model, found) as seen:
            model.eval()
            for step, number in enumerate(evidence.progress(mine[done:], "training scenarios"), start=done + 1):
                encoded = encode(evidence.tokenizer, scenarios[number])
                _run(model, encoded, seen)
                _add(encoded, seen, found, starts[number])
                if path is not None and (step % _CHECKPOINT_EVERY == 0 or step == len(mine)):
                    write_checkpoint(path, found.tensors(), step, key)
    finally:
        model.train(training)
    add_up(list(found.tensors().values()))
    return found


def _empty(evidence: Evidence) -> Readings:
    modules = find_down_projections(evidence.model)
    sizes = sorted({layer_sizes(module) for module in modules.values()})
    if len(sizes) > 1:
        raise NeVAError(f"The FFNs of this model have different sizes ({sizes}), which baselines do not handle yet.")
    ((neurons, hidden),) = sizes
    name, blocks = decoder_blocks(evidence.model)
    return Readings.zeros(
        list(evidence.values),
        list(modules),
        [f"{name}.{number}" for number in range(len(blocks))],
        find_activations(evidence.model),
        list(evidence.train),
        neurons,
        hidden,
    )


@contextmanager
def _watched(model: nn.Module, found: Readings) -> Iterator[_Seen]:
    seen = _Seen()
    handles: list[RemovableHandle] = []

    def keep(where: dict[int, torch.Tensor], layer: int, x: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        if seen.open:
            where[layer] = x[0] if isinstance(x, tuple) else x

    def after(name: str, where: dict[int, torch.Tensor], layer: int) -> RemovableHandle:
        return model.get_submodule(name).register_forward_hook(lambda _, __, output: keep(where, layer, output))

    def before(name: str, where: dict[int, torch.Tensor], layer: int) -> RemovableHandle:
        return model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: keep(where, layer, inputs))

    try:
        for layer, (block, module) in enumerate(zip(found.blocks, found.modules, strict=True)):
            handles.append(after(block, seen.streams, layer))
            handles.append(before(module, seen.inputs, layer))
            if found.activations is not None:
                handles.append(after(found.activations[layer], seen.activated, layer))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, encoded: EncodedScenario, seen: _Seen) -> None:
    device = next(model.parameters()).device
    prompt, replies = encoded.prompt.to(device), encoded.replies.to(device)
    cache = DynamicCache(config=text_config(model))
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(replies))
    mask = torch.cat([torch.ones(len(replies), prompt.shape[1]), encoded.mask], dim=1).long().to(device)
    seen.open = True
    try:
        model(input_ids=replies, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        seen.open = False


def _add(encoded: EncodedScenario, seen: _Seen, found: Readings, start: int) -> None:
    replies, tokens = encoded.mask.shape
    mask = encoded.mask[:, :, None]
    lengths = encoded.mask.sum(1).long()
    every = torch.arange(replies)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(replies, tokens, -1).float().cpu()

    ends, inputs, means, shares = [], [], [], []
    for layer in range(len(found.modules)):
        stream, x = rows(seen.streams[layer]), rows(seen.inputs[layer])
        activated = rows(seen.activated[layer]) if found.activations is not None else x
        ends.append(stream[every, lengths - 1])
        means.append((stream * mask).sum(1) / lengths[:, None])
        inputs.append(x[every, lengths - 1])
        shares.append(((activated > 0) * mask).sum(1) / lengths[:, None])
        _count(found.histogram[layer], activated[encoded.mask > 0])
    found.last[start : start + replies] = torch.stack(ends, dim=1)
    x = torch.stack(inputs, dim=1).double()
    flat = x.abs().flatten(1)
    top = flat.topk(max(round(STRONGEST * flat.shape[1]), 1), dim=1).indices
    found.strong.view(-1).index_add_(0, top.flatten(), torch.ones(top.numel(), dtype=torch.float64))
    found.replies += replies
    weights = [contrast(encoded.keys, value) for value in found.values]
    heard = [number for number, row in enumerate(weights) if row is not None]
    if not heard:
        return
    table = torch.tensor([weights[number] for number in heard], dtype=torch.float64)

    def held(per_reply: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.einsum("vr,rln->vln", by, per_reply)

    own, rival = (table > 0).double(), (table < 0).double()
    found.count[heard] += 1
    found.rivals[heard] += rival.sum(1)
    found.stream[heard] += held(torch.stack(means, dim=1).double(), table)
    found.active[heard] += held(torch.stack(shares, dim=1).double(), table)
    found.difference[heard] += held(x, table)
    for sums, squares, by in (
        (found.own_sum, found.own_square, own),
        (found.rival_sum, found.rival_square, rival),
    ):
        sums[heard] += held(x, by)
        squares[heard] += held(x.square(), by)


def _count(histogram: torch.Tensor, x: torch.Tensor) -> None:
    """Adds activations, `[tokens, N]`, to a histogram, `[N, BINS]`."""
    where = bins(x) + torch.arange(x.shape[1]) * histogram.shape[1]
    histogram.view(-1).index_add_(0, where.flatten(), torch.ones(x.numel()))
