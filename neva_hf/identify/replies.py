"""What edits do to the replies of values beyond the first order, as samples of the Fisher matrix on them.

The log-probability of a reply moves by `J.d - d.F.d / 2` under an edit d, to second order, F being the Fisher matrix on
that reply. Neurons that speak of a value are active in its replies, so gains that hardly change neutral text may change
them much: that eats up what the edit does at strength 1, and adds as much at -1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.errors import NeVAError
from neva_hf.measure import Progress, grouped_logits, no_progress
from neva_hf.scenarios import Scenario, scenarios_hash

from .calibrate import spread
from .collect import encode_replies
from .lengths import only
from .sampling import Probes, drawn_samples, sampled

# From each forward pass: another backward pass costs less than another reply.
_DRAWS = 2


@dataclass(frozen=True)
class ReplySamples:
    """What editing some neurons does to the replies of each value, from [`reply_samples`].

    Args:
        neurons (`torch.Tensor`): Bool `[V, L, N]`: which ones, per value.
        samples (`torch.Tensor`): Float32 `[V, samples, parts, k]`, k being the most that a value has; those that it lacks
            are 0. Parts are shifts and, where they were asked for, gains.
    """

    neurons: torch.Tensor
    samples: torch.Tensor

    def at(self, value: int, index: torch.Tensor) -> torch.Tensor:
        """The samples of some neurons of a value.

        Args:
            value (`int`): The row of the value.
            index (`torch.Tensor`): Int64, in order: which neurons, counted over all layers.

        Returns:
            `torch.Tensor`: Float32 `[samples, parts * len(index)]`, all shifts before all gains.

        Raises:
            `NeVAError`: If there are no samples of one of them.
        """
        known = self.neurons[value].flatten().nonzero()[:, 0]
        places = torch.searchsorted(known, index)
        if not bool((known[places.clamp(max=len(known) - 1)] == index).all()):
            raise NeVAError("There are no samples of some of these neurons: take them for all that may be chosen.")
        return self.samples[value][..., places].flatten(1)


def reply_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    values: Sequence[str],
    neurons: torch.Tensor,
    *,
    most: int = 256,
    seed: int = 0,
    gains: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 32,
    progress: Progress[Any] = no_progress,
) -> ReplySamples:
    """Samples of the Fisher matrix on values' own replies, taken as [`fisher_samples`] takes them on neutral texts.

    Args:
        model (`nn.Module`): A causal language model of transformers, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): The scenarios.
        values (`Sequence[str]`): The values whose replies to take.
        neurons (`torch.Tensor`): Bool `[V, L, N]`: of which neurons to keep samples, from [`candidates`]. They bound the
            memory: `4 * V * 2 * most * parts * k` bytes for k neurons each.
        most (`int`): From how many scenarios to take samples, evenly over all.
        seed (`int`): For the random numbers, which are drawn on the model's device.
        gains (`bool`): Whether to sample what gains do, too.
        checkpoint (`Path`, *optional*): A file to write the samples to as they are found, and to go on from.
        checkpoint_every (`int`): After how many scenarios.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        [`ReplySamples`]: On the CPU. Those of scenarios without a reply of the value are 0, and the others are larger by as
            much, so that the mean over all is that over those.
    """
    taken = spread(list(scenarios), most)
    index = [row.flatten().nonzero()[:, 0] for row in neurons]
    shape = (_DRAWS, len(values), 2 if gains else 1, max(map(len, index)))

    def draw(number: int, probes: Probes) -> torch.Tensor:
        encoded = encode_replies(tokenizer, taken[number])
        here = [place for place, value in enumerate(values) if value in encoded.keys]
        found = torch.zeros(shape)
        if here:
            own = only(encoded, [encoded.keys.index(values[place]) for place in here])
            probes.rows = len(here)
            (logits,) = grouped_logits(model, [own])
            drawn = drawn_samples(logits, own.mask, probes, _DRAWS, seed * 1_000_003 + number).flatten(-2)
            for row, place in enumerate(here):
                found[:, place, :, : len(index[place])] = drawn[:, row, :, index[place]]
        return found

    chosen = hashlib.sha256(neurons.numpy().tobytes()).hexdigest()
    found = sampled(
        model,
        len(taken),
        shape,
        draw,
        gains=gains,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        key=["replies", scenarios_hash(taken), list(values), chosen, seed],
        progress=lambda passes, _: progress(passes, "replies"),
    )
    told = torch.tensor([[value in one.replies for value in values] for one in taken]).sum(0).clamp(min=1)
    found *= (len(taken) / told).sqrt()[:, None, None]
    return ReplySamples(neurons, found.flatten(0, 1).transpose(0, 1))
