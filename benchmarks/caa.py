"""CAA, the method that maps are compared with, and what both are measured by.

CAA (Panickssery et al. 2023, arXiv 2312.06681) adds a vector to the residual stream behind one layer, at all positions.
Here the vector of a value is the mean, over training scenarios, of the difference between the residual stream in its reply
and in the competing replies to the same question (mean over the reply's tokens): the contrast that maps are found with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neva_hf.measure import EncodedScenario, contrast, encode, reply_log_probs
from neva_hf.scenarios import Scenario

Setting = tuple[str, int]
"""A value, and the sign of its strength: -1 or 1."""

Steer = Callable[[Sequence[Setting]], AbstractContextManager[None]]
"""Puts settings in force: one per row of the batch, or a single one for all rows."""

# As neva_hf's calibration: a rough search on the first texts, then a fine one on more.
ROUGH, FINE = (3, 6, 0.2), (16, 4, 0.03)


@contextmanager
def added(block: nn.Module, vectors: torch.Tensor) -> Iterator[None]:
    """Adds vectors, `[rows or 1, hidden]`, to what a block returns at all positions."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        stream = stream + vectors[:, None].to(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def steer_by(block: nn.Module, vectors: Mapping[Setting, torch.Tensor]) -> Steer:
    """CAA as a [`Steer`]: the scaled vector, `[hidden]`, of each setting."""
    return lambda settings: added(block, torch.stack([vectors[setting] for setting in settings]))


@dataclass
class Contrasts:
    """Sums of residual differences over scenarios.

    Args:
        total (`torch.Tensor`): Float32 `[V, layers, hidden]`.
        count (`torch.Tensor`): Int64 `[V]`, the scenarios that contrast each value.
        done (`int`): The scenarios so far.
    """

    total: torch.Tensor
    count: torch.Tensor
    done: int = 0

    def add(
        self, model: Any, tokenizer: Any, scenario: Scenario, values: Sequence[str], layers: Sequence[int]
    ) -> None:
        """Adds one scenario."""
        encoded = encode(tokenizer, scenario)
        count, prompt = len(encoded.keys), encoded.prompt.shape[1]
        ids = torch.cat([encoded.prompt.expand(count, -1), encoded.replies], dim=1).to(model.device)
        mask = torch.cat([torch.ones(count, prompt), encoded.mask], dim=1).long().to(model.device)
        with torch.inference_mode():
            states = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        # (`hidden_states[0]` are the embeddings)
        kept = torch.stack([states.hidden_states[layer + 1][:, prompt:].float().cpu() for layer in layers])
        means = (kept * encoded.mask[None, :, :, None]).sum(2) / encoded.mask.sum(1)[None, :, None]
        for row, value in enumerate(values):
            weights = contrast(encoded.keys, value)
            if weights is not None:
                self.total[row] += torch.einsum("r,lrh->lh", torch.tensor(weights), means)
                self.count[row] += 1
        self.done += 1

    def mean(self) -> torch.Tensor:
        """The CAA vectors, `[V, layers, hidden]`."""
        return self.total / self.count.clamp(min=1)[:, None, None]


def log_probs(
    model: Any, tokenizer: Any, scenario: Scenario, steer: Steer | None, setting: Setting | None, rows: int
) -> dict[str, float]:
    """Reply key -> nats per token, at most `rows` replies at once."""
    encoded = encode(tokenizer, scenario)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for start in range(0, len(encoded.keys), rows):
            here = slice(start, start + rows)
            few = EncodedScenario(encoded.prompt, encoded.replies[here], encoded.mask[here], encoded.keys[here])
            if steer is None or setting is None:
                told = reply_log_probs(model, few)
            else:
                with steer([setting]):
                    told = reply_log_probs(model, few)
            found |= dict(zip(few.keys, told.tolist(), strict=True))
    return found


def costs(
    model: Any, sequences: Sequence[Sequence[int]], steer: Steer, settings: Sequence[Setting], rows: int
) -> dict[str, Any]:
    """What settings cost on token sequences: KL divergence from the base model, and the losses behind perplexity.

    Args:
        model (`nn.Module`): The model.
        sequences (`Sequence[Sequence[int]]`): Token ids.
        steer (`Steer`): Puts settings in force.
        settings (`Sequence[Setting]`): The settings.
        rows (`int`): At most so many settings in one forward pass.

    Returns:
        `dict`: `kl` and `loss` with a number per setting, `base_loss` and `tokens`; nats per token.
    """
    kl = torch.zeros(len(settings), dtype=torch.float64)
    loss = torch.zeros(len(settings), dtype=torch.float64)
    base_loss, tokens = 0.0, 0
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=model.device)
            told = ids[0, 1:, None]
            base = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            probabilities = base.exp()
            base_loss -= float(base.gather(1, told).sum())
            for start in range(0, len(settings), rows):
                few = settings[start : start + rows]
                with steer(few):
                    logits = model(input_ids=ids.expand(len(few), -1), use_cache=False).logits
                # Row by row: with a large vocabulary, one row of log-probabilities is half a gigabyte.
                for row in range(len(few)):
                    here = logits[row, :-1].float().log_softmax(-1)
                    loss[start + row] -= float(here.gather(1, told).sum())
                    kl[start + row] += float(torch.where(probabilities > 0, probabilities * (base - here), 0.0).sum())
            tokens += len(told)
    return {
        "kl": (kl / tokens).tolist(),
        "loss": (loss / tokens).tolist(),
        "base_loss": base_loss / tokens,
        "tokens": tokens,
    }


def calibrated(
    model: Any,
    block: nn.Module,
    vectors: Mapping[Setting, torch.Tensor],
    sequences: Sequence[Sequence[int]],
    target_kl: float,
    rows: int,
    *,
    scales: Mapping[str, float] | None = None,
    phases: Sequence[tuple[int, int, float]] = (ROUGH, FINE),
) -> dict[str, Any]:
    """How much each vector must be scaled to cost `target_kl` nats per token on some texts.

    Args:
        model (`nn.Module`): The model.
        block (`nn.Module`): Whose output vectors are added to.
        vectors (`Mapping[Setting, torch.Tensor]`): The vectors.
        sequences (`Sequence[Sequence[int]]`): The texts as token ids.
        target_kl (`float`): The wanted KL divergence.
        rows (`int`): See [`costs`].
        scales (`Mapping[str, float]`, *optional*): Value -> where to begin.
        phases (`Sequence[tuple[int, int, float]]`): Texts, rounds at most, and tolerance of a scale, of each search.

    Returns:
        `dict`: `scales` and the `kl` that they cost, by value.
    """
    settings = list(vectors)
    found = {setting: (scales or {}).get(setting[0], 1.0) for setting in settings}
    kl: list[float] = []
    for texts, rounds, tolerance in phases:
        for last in [False] * rounds + [True]:
            steer = steer_by(block, {setting: found[setting] * vectors[setting] for setting in settings})
            kl = costs(model, sequences[:texts], steer, settings, rows)["kl"]
            factors = [min(max((target_kl / max(one, 1e-9)) ** 0.5, 1 / 8), 8.0) for one in kl]
            # What is measured last is what holds: no scale changes after it.
            if last or all(abs(factor - 1) <= tolerance for factor in factors):
                break
            for setting, factor in zip(settings, factors, strict=True):
                found[setting] *= factor
    return {
        "scales": {value: found[value, sign] for value, sign in settings},
        "kl": {value: one for (value, _), one in zip(settings, kl, strict=True)},
    }
