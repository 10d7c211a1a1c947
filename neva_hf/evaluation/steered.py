"""What a model says under a method: log-probabilities of replies, and what it costs on neutral text.

As measure.py, for anything that steers ([`Method`]). A method may change the model while it runs, the prompt, or both;
whatever strengths a neuron map has set on the model are at 0 meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import text_config
from neva_hf.baselines.damage import damage_of
from neva_hf.baselines.hooks import neutral
from neva_hf.baselines.method import Dials, Method
from neva_hf.measure import EncodedScenario, encode, reply_log_probs
from neva_hf.scenarios import Scenario

MAX_TOKENS = 160
"""Of each neutral text, at most so many tokens from the front."""

# How many logits one forward pass may give: a gigabyte in float32.
_MAX_LOGITS = 2**28


@contextmanager
def in_force(model: nn.Module, method: Method | None, dials: Dials) -> Iterator[None]:
    """Puts a method's dials in force and nothing else.

    Args:
        model (`nn.Module`): The model.
        method ([`Method`], *optional*): The method; the base model when `None`.
        dials (`Mapping[str, float]`): Value -> strength, for all rows.
    """
    with neutral(model), nullcontext() if method is None else method.at([dials]):
        yield


def system_prompt(method: Method | None, dials: Dials, system: str | None = None) -> str | None:
    """The system prompt that is used: the one given, followed by the method's own."""
    own = method.system(dials) if method is not None else None
    return "\n".join(text for text in (system, own) if text) or None


def steered_log_probs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    method: Method | None = None,
    dials: Dials | None = None,
    *,
    system: str | None = None,
) -> list[dict[str, float]]:
    """The log-probabilities of all replies of some scenarios under one setting of a method's dials.

    The prompt of a scenario is run once for all of its replies. (Its keys and values depend on the dials, so it is run
    once per setting.)

    Args:
        model (`nn.Module`): The model that the method steers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): The scenarios.
        method ([`Method`], *optional*): The method; the base model when `None`.
        dials (`Mapping[str, float]`, *optional*): Value -> strength.
        system (`str`, *optional*): A system prompt, before the method's own.

    Returns:
        `list[dict[str, float]]`: Per scenario, reply key -> nats per token.
    """
    dials = dials or {}
    found: list[dict[str, float]] = []
    with torch.inference_mode(), in_force(model, method, dials):
        for scenario in scenarios:
            encoded = encode(tokenizer, scenario, system_prompt(method, dials, system))
            count, width = encoded.replies.shape
            size = max(_MAX_LOGITS // (width * text_config(model).vocab_size), 1)
            row: dict[str, float] = {}
            for start in range(0, count, size):
                here = slice(start, start + size)
                few = EncodedScenario(encoded.prompt, encoded.replies[here], encoded.mask[here], encoded.keys[here])
                row |= dict(zip(few.keys, reply_log_probs(model, few).tolist(), strict=True))
            found.append(row)
    return found


def steered_damage(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    method: Method,
    settings: Sequence[Dials],
    *,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """What settings of a method cost on neutral texts, text by text; see [`~neva_hf.baselines.damage.damage_of`].

    Args:
        model (`nn.Module`): The model that the method steers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts of two tokens or more.
        method ([`Method`]): The method.
        settings (`Sequence[Mapping[str, float]]`): The dials of each setting, S of them.
        max_tokens (`int`): Of each text, at most so many tokens from the front.

    Returns:
        `dict[str, Any]`: Plain data, nats summed over a text's tokens: `tokens` `[n]`, `kl` `[S][n]` (the divergence of the
        base model from the steered one) and `loss` `[S][n]` (how much more the text costs than under the base model).
    """
    tokens: list[int] = []
    kl: list[list[float]] = [[] for _ in settings]
    loss: list[list[float]] = [[] for _ in settings]
    for text in texts:
        found = damage_of(method, model, tokenizer, [text], settings, max_tokens=max_tokens)
        tokens.append(found[0].tokens)
        for number, one in enumerate(found):
            kl[number].append(one.kl * one.tokens)
            loss[number].append(math.log(max(one.perplexity_ratio, 1e-300)) * one.tokens)
    return {"tokens": tokens, "kl": kl, "loss": loss}


def mapping_of(dials: Mapping[str, float]) -> str:
    """Dials as a short text, for the names of pieces: `benevolence+1`."""
    return ",".join(f"{value}{strength:+g}" for value, strength in dials.items())
