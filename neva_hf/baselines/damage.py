"""What a method's settings cost on neutral text: KL divergence from the base model, and perplexity.

The same texts, the same limit of tokens and the same divergence as for neuron maps ([`~neva_hf.measure.damage`]), for
methods of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import text_config
from neva_hf.errors import NeVAError
from neva_hf.measure import Damage, Progress, no_progress

from .hooks import neutral
from .method import Dials, Method

# How many logits a batch may have: a gigabyte in float32.
_MAX_LOGITS = 2**28


def damage_of(
    method: Method,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: Sequence[Dials],
    *,
    max_tokens: int = 160,
    progress: Progress[str] = no_progress,
) -> list[Damage]:
    """KL divergence from the base model and perplexity, for several settings of a method.

    Each text is run once as it is and once for each of the settings, as rows of one batch, or of several where the logits
    of all would take more than a gigabyte. A system prompt stands in front of the text, with an empty line between; only
    the text's own tokens are compared.

    Args:
        method ([`Method`]): The method.
        model (`nn.Module`): The model that it steers. Its NeVA layers, if any, are at 0 unless the method dials them.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts.
        settings (`Sequence[Mapping[str, float]]`): Value -> strength, one mapping per setting.
        max_tokens (`int`): Of each text, at most so many tokens from the front.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `list[Damage]`: One per setting. KL is D(base || steered), the mean over tokens, nats.

    Raises:
        `NeVAError`: If the texts hold nothing to measure on.
    """
    kl = torch.zeros(len(settings), dtype=torch.float64)
    loss = torch.zeros(len(settings), dtype=torch.float64)
    base_loss, tokens = 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode(), neutral(model):
        for text in progress(texts, "neutral text"):
            ids = list(tokenizer(text)["input_ids"][:max_tokens])
            if len(ids) < 2:
                continue
            told = torch.tensor(ids[1:], device=device)[:, None]
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
            base = logits[0, :-1].float().log_softmax(-1)
            probabilities = base.exp()
            base_loss -= float(base.gather(1, told).double().sum())
            for number, steered in _steered(method, model, tokenizer, ids, settings):
                here = steered[-len(ids) : -1].float().log_softmax(-1)
                # (probability 0 times log-probability -inf would be no number)
                gap = torch.where(probabilities > 0, probabilities * (base - here), 0.0)
                kl[number] += float(gap.double().sum())
                loss[number] -= float(here.gather(1, told).double().sum())
            tokens += len(told)
    if tokens == 0:
        raise NeVAError("The texts to measure damage on hold fewer than two tokens.")
    return [
        Damage(
            kl=max(float(one) / tokens, 0.0),
            # (torch's exponential is infinite where that of `math` raises)
            perplexity_ratio=float(((own - base_loss) / tokens).exp()),
            tokens=tokens,
        )
        for one, own in zip(kl, loss, strict=True)
    ]


def _steered(
    method: Method,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    settings: Sequence[Dials],
) -> Iterator[tuple[int, torch.Tensor]]:
    """The logits under each setting, `[tokens, vocabulary]`; settings with one system prompt share a batch."""
    together: dict[str | None, list[int]] = {}
    for number, setting in enumerate(settings):
        together.setdefault(method.system(setting), []).append(number)
    device = next(model.parameters()).device
    for system, numbers in together.items():
        row = torch.tensor([_behind(tokenizer, system, ids)], device=device)
        size = max(_MAX_LOGITS // (row.shape[1] * text_config(model).vocab_size), 1)
        for start in range(0, len(numbers), size):
            few = numbers[start : start + size]
            with method.at([settings[number] for number in few]):
                logits = model(input_ids=row.expand(len(few), -1), use_cache=False).logits
            yield from zip(few, logits, strict=True)


def _behind(tokenizer: PreTrainedTokenizerBase, system: str | None, ids: list[int]) -> list[int]:
    """A text's tokens with a system prompt in front; a beginning-of-text token stays the first."""
    if system is None:
        return ids
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return first + list(tokenizer(f"{system}\n\n", add_special_tokens=False)["input_ids"]) + ids[len(first) :]
