"""How likely continuations are after contexts, with as few tokens run as possible.

Benchmarks ask how likely each of several answers to one question is. The question is run once and its answers go on from
its cache; logits are computed where an answer stands and nowhere else. Contexts of the same length make one batch, so
no padding stands in front of an answer, and positions and masks are the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from neva_hf.architectures import text_config
from neva_hf.errors import NeVAError

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, and of what follows it."""

TOKENS = 1024


def continuation_log_probs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    tokens: int = TOKENS,
    share: bool = True,
    done: Callable[[int], object] = lambda count: None,
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation after its context.

    Args:
        model (`nn.Module`): A causal language model of transformers, under whatever strengths are in force for all rows.
        pairs (`Sequence[tuple[Sequence[int], Sequence[int]]]`): Token ids of context and continuation, neither empty.
        tokens (`int`): At most about so many tokens in one forward pass.
        share (`bool`): Whether a context that several pairs have is run once; needs a model with a key-value cache.
        done (`Callable[[int], object]`): Told how many more pairs are finished.

    Returns:
        `list[tuple[float, bool]]`: For each pair, in order: the sum of the log-probabilities of the continuation's
        tokens, in nats, and whether each of them is the likeliest one (greedy decoding would write them).

    Raises:
        `NeVAError`: If a context or a continuation is empty.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise NeVAError(f"Pair {number} has an empty context or continuation: there is nothing to measure.")
        groups.setdefault(tuple(context), []).append(number)
    found: list[tuple[float, bool] | None] = [None] * len(pairs)
    alone = [number for group in groups.values() if not share or len(group) == 1 for number in group]
    shared = [group for group in groups.values() if share and len(group) > 1]
    worth = _worth(model)
    with torch.inference_mode():
        for batch in _batches(alone, lambda number: len(pairs[number][0]) + len(pairs[number][1]) - 1, tokens, worth):
            for number, one in zip(batch, _whole(model, [pairs[number] for number in batch]), strict=True):
                found[number] = one
            done(len(batch))
        for same in _by_length(shared, lambda group: len(pairs[group[0]][0])):
            for some in _batches(same, lambda group: len(pairs[group[0]][0]), tokens, worth):
                for number, one in _forked(model, some, pairs, tokens):
                    found[number] = one
                done(sum(map(len, some)))
    return [one for one in found if one is not None]


def _whole(model: nn.Module, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Contexts with one continuation each, in one pass, padded on the right where nothing looks back at it."""
    inputs = [[*context, *continuation[:-1]] for context, continuation in pairs]
    width = max(map(len, inputs))
    # The last token of a context tells the first one of its continuation.
    first = min(len(context) - 1 for context, _ in pairs)
    ids = _padded(model, inputs, width)
    # Logits need no mask, since nothing looks ahead; methods that read a prompt's last token do.
    mask = _padded(model, [[1] * len(row) for row in inputs], width) if min(map(len, inputs)) < width else None
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first)
    logits = output.logits[:, first - width :]
    found = []
    for row, (context, continuation) in enumerate(pairs):
        start = len(context) - 1 - first
        found.append(_told(logits[row, start : start + len(continuation)], continuation))
    return found


def _forked(
    model: nn.Module, groups: Sequence[Sequence[int]], pairs: Sequence[Pair], tokens: int
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Contexts of the same length, each run once, and their continuations from its cache."""
    ids = torch.tensor([list(pairs[group[0]][0]) for group in groups], device=_device(model))
    cache = DynamicCache(config=text_config(model))
    firsts = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
    rows = [(row, number) for row, group in enumerate(groups) for number in group]
    longer = []
    for row, number in rows:
        continuation = pairs[number][1]
        if len(continuation) == 1:
            yield number, _told(firsts[row], continuation)
        else:
            longer.append((row, number))
    for batch in _batches(longer, lambda one: len(pairs[one[1]][1]) - 1, tokens, _worth(model)):
        branch = copy.deepcopy(cache)
        branch.batch_select_indices(torch.tensor([row for row, _ in batch], device=ids.device))
        width = max(len(pairs[number][1]) - 1 for _, number in batch)
        rest = _padded(model, [list(pairs[number][1][:-1]) for _, number in batch], width)
        logits = model(input_ids=rest, past_key_values=branch, use_cache=True).logits
        for place, (row, number) in enumerate(batch):
            continuation = pairs[number][1]
            yield number, _told(torch.cat([firsts[row], logits[place, : len(continuation) - 1]]), continuation)


def _told(logits: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """What logits `[tokens, vocabulary]` say about a continuation of as many tokens."""
    wanted = torch.tensor(list(continuation), device=logits.device)
    logits = logits.float()
    log_probs = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
    return float(log_probs.double().sum()), bool((logits.argmax(-1) == wanted).all())


def _by_length(items: Sequence[Any], length: Callable[[Any], int]) -> list[list[Any]]:
    found: dict[int, list[Any]] = {}
    for item in items:
        found.setdefault(length(item), []).append(item)
    return [found[key] for key in sorted(found, reverse=True)]


def _batches(items: Sequence[Any], length: Callable[[Any], int], tokens: int, worth: int) -> list[list[Any]]:
    """Cuts items, longest first, into batches of at most so many tokens, padding included, at the least cost.

    A batch costs its tokens, padding included, and `worth` more: see `_worth`. The best cut of the first n items follows
    from the best cuts of fewer.
    """
    ordered = sorted(items, key=length, reverse=True)
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(ordered) + 1):
        tried = []
        for start in range(end - 1, -1, -1):
            size = (end - start) * length(ordered[start])
            if size > tokens and end - start > 1:
                break
            tried.append((best[start][0] + size + worth, start))
        best.append(min(tried))
    cuts = [len(ordered)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][1])
    return [ordered[start:end] for end, start in pairwise(cuts)][::-1]


def _worth(model: nn.Module) -> int:
    """How many tokens could be run in the time that a pass takes besides: few on a CPU, many where kernels are started."""
    return 32 if _device(model).type == "cpu" else 1024


def _padded(model: nn.Module, rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
