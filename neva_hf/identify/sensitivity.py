"""How much editing each neuron disturbs a model on neutral text: samples that stand for its Fisher matrix.

For a small shift d of the neurons, the mean KL divergence from the base model is `d.F.d / 2` nats per token, F being the
Fisher matrix of the next-token distributions with respect to d. F has as many rows as neurons, so it is kept as samples
(sampling.py). Gains are further coordinates of d: what is added is then a multiple of the neuron's own activation.

How good an edit is depends on how many samples there are and on how much text they come from, hardly on how many tokens
each is taken from: with few of them, neurons look harmless that are not. So texts are cut into short windows, each of
which gives samples of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import find_down_projections
from neva_hf.errors import NeVAError
from neva_hf.layer import layer_sizes
from neva_hf.measure import Progress, no_progress

from .sampling import Probes, drawn_samples, sampled

_DRAWS = 2  # from each forward pass, which costs as much as a backward pass


def fisher_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    samples: int = 2048,
    window: int = 32,
    rows: int = 8,
    seed: int = 0,
    gains: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 32,
    progress: Progress[Any] = no_progress,
) -> torch.Tensor:
    """Samples whose covariance is the Fisher matrix of a model with respect to shifts of its FFN neurons.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts.
        samples (`int`): How many.
        window (`int`): From how many tokens each is taken.
        rows (`int`): How many windows run at once.
        seed (`int`): For the order of the windows, and the random numbers, which are drawn on the model's device: those
            of a CPU are the same everywhere, those of a GPU are others.
        gains (`bool`): Whether to sample what gains cost, too.
        checkpoint (`Path`, *optional*): A file to write the samples to as they are found, and to go on from.
        checkpoint_every (`int`): After how many passes.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `torch.Tensor`: Float32 `[samples, parts, L, N]` on the CPU: its size is all that this keeps. The parts are shifts
            and, with `gains`, gains.

    Raises:
        `NeVAError`: If there is no text with at least two tokens.
    """
    windows = _windows(tokenizer, texts, window)
    # (another seed than that of the first pass, or the order and what it draws would be one stream of numbers)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed + 7))
    device = next(model.parameters()).device

    def draw(number: int, probes: Probes) -> torch.Tensor:
        ids = windows[order[torch.arange(number * rows, (number + 1) * rows) % len(order)]]
        probes.rows = len(ids)
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        return drawn_samples(logits, torch.ones(ids.shape), probes, _DRAWS, seed * 1_000_003 + number).flatten(0, 1)

    taken = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    modules = list(find_down_projections(model).values())
    return sampled(
        model,
        -(-samples // (_DRAWS * rows)),
        (_DRAWS * rows, 2 if gains else 1, len(modules), layer_sizes(modules[0])[0]),
        draw,
        gains=gains,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        key=["sensitivity, all tokens", taken, samples, window, rows, seed],
        progress=lambda passes, _: progress(passes, "sensitivity"),
    ).flatten(0, 1)[:samples]


def _windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int) -> torch.Tensor:
    """Texts cut into pieces of one length, with the token in front that the model expects: int64 `[pieces, tokens]`."""
    front = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]
    bodies = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    width = min(window - len(front), max(map(len, bodies), default=0))
    if width < 2:
        raise NeVAError("The neutral texts hold fewer than two tokens.")
    pieces = [
        front + body[start : start + width] for body in bodies for start in range(0, len(body) - width + 1, width)
    ]
    return torch.tensor(pieces)
