"""Margins and damage of any causal language model, on scenarios and on neutral text.

Invariants: log-probabilities are in nats per token of the reply (tokens of the prompt do not count, nor does an end
token), so replies of different lengths compare. A scenario's prompt is run once; its replies go on from its cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from .dial import dialled
from .errors import NeVAError
from .prompts import format_prompt, format_reply
from .scenarios import Scenario
from .strengths import Strengths

Item = TypeVar("Item")

# How many logits a batch may have when damage is measured: a gigabyte in float32.
_MAX_LOGITS = 2**28

Progress = Callable[[Iterable[Item], str], Iterable[Item]]
"""Wraps a loop to show how far it is: `progress(items, "what")`."""


def no_progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """The silent [`Progress`]."""
    return items


@dataclass(frozen=True)
class EncodedScenario:
    """A scenario as token ids.

    Args:
        prompt (`torch.Tensor`): Int64 `[1, prompt tokens]`.
        replies (`torch.Tensor`): Int64 `[replies, tokens]`, padded on the right.
        mask (`torch.Tensor`): Float32 `[replies, tokens]`, 1 at the replies' own tokens.
        keys (`list[str]`): The key of each reply.
    """

    prompt: torch.Tensor
    replies: torch.Tensor
    mask: torch.Tensor
    keys: list[str]

    @property
    def tokens(self) -> int:
        """The tokens that the model has to run, padding included."""
        return self.prompt.numel() + self.replies.numel()


def encode(tokenizer: PreTrainedTokenizerBase, scenario: Scenario, system: str | None = None) -> EncodedScenario:
    """Turns a scenario into token ids, in the model's chat template or in a plain-text form.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        scenario ([`Scenario`]): The scenario.
        system (`str`, *optional*): A system prompt.

    Returns:
        [`EncodedScenario`]: On the CPU.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = ids(format_prompt(tokenizer, scenario.question, system=system))
    replies = [ids(format_reply(tokenizer, reply)) for reply in scenario.replies.values()]
    if not prompt or not all(replies):
        raise NeVAError(f"Scenario {scenario.id!r} has a text without a token in this model's vocabulary.")
    width = max(map(len, replies))
    padded = torch.tensor([reply + [0] * (width - len(reply)) for reply in replies])
    mask = torch.tensor([[1.0] * len(reply) + [0.0] * (width - len(reply)) for reply in replies])
    return EncodedScenario(torch.tensor([prompt]), padded, mask, list(scenario.replies))


def reply_log_probs(model: nn.Module, encoded: EncodedScenario, *, prefix_grad: bool = False) -> torch.Tensor:
    """The log-probability of each reply of a scenario.

    Args:
        model (`nn.Module`): A causal language model of transformers, or one with adapters.
        encoded ([`EncodedScenario`]): The scenario.
        prefix_grad (`bool`): Whether gradients flow into the prompt too.

    Returns:
        `torch.Tensor`: Float32 `[replies]`, nats per token, on the model's device; with gradients if they are enabled.
    """
    (found,) = grouped_log_probs(model, [encoded], prefix_grad=prefix_grad)
    return found


def grouped_log_probs(
    model: nn.Module, groups: Sequence[EncodedScenario], *, prefix_grad: bool = False
) -> Iterator[torch.Tensor]:
    """[`reply_log_probs`] of groups of replies to one prompt, which is run once. Each group is run when it is asked for.

    Args:
        model (`nn.Module`): A causal language model of transformers, or one with adapters.
        groups (`Sequence[EncodedScenario]`): The replies of each.
        prefix_grad (`bool`): Whether gradients flow into the prompt too; for a single group.

    Returns:
        `Iterator[torch.Tensor]`: For each group, float32 `[replies]`.
    """
    for group, logits in zip(groups, grouped_logits(model, groups, prefix_grad=prefix_grad), strict=True):
        replies, mask = group.replies.to(logits.device), group.mask.to(logits.device)
        told = torch.gather(logits, 2, replies[:, :, None])[:, :, 0] - logits.logsumexp(-1)
        yield (told * mask).sum(1) / mask.sum(1)


def grouped_logits(
    model: nn.Module, groups: Sequence[EncodedScenario], *, prefix_grad: bool = False
) -> Iterator[torch.Tensor]:
    """The logits that tell the tokens of replies. See [`grouped_log_probs`].

    Args:
        model (`nn.Module`): A causal language model of transformers, or one with adapters.
        groups (`Sequence[EncodedScenario]`): The replies of each.
        prefix_grad (`bool`): Whether gradients flow into the prompt too; for a single group.

    Returns:
        `Iterator[torch.Tensor]`: For each group, float32 `[replies, tokens, vocabulary]`.
    """
    device = _device(model)
    prompt = groups[0].prompt.to(device)
    cache = DynamicCache(config=_text_config(model))
    with torch.set_grad_enabled(prefix_grad and torch.is_grad_enabled()):
        first = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
    for group in groups:
        # (the last one may use it up)
        branch = cache if group is groups[-1] else copy.deepcopy(cache)
        replies, mask, count = group.replies.to(device), group.mask.to(device), len(group.replies)
        branch.batch_repeat_interleave(count)
        attention = torch.cat([torch.ones(count, prompt.shape[1], device=device), mask], dim=1).long()
        # The first token of a reply is told by the prompt's last position, the others by the token before.
        logits = first.expand(count, -1, -1)
        if replies.shape[1] > 1:
            ids, seen = replies[:, :-1], attention[:, :-1]
            rest = model(input_ids=ids, attention_mask=seen, past_key_values=branch, use_cache=True)
            logits = torch.cat([logits, rest.logits], dim=1)
        yield logits.float()


def scenario_log_probs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scenarios: Sequence[Scenario],
    *,
    system: str | None = None,
    progress: Progress[Scenario] = no_progress,
) -> list[dict[str, float]]:
    """The log-probabilities of all replies of some scenarios, under the strengths that are in force.

    Args:
        model (`nn.Module`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        scenarios (`Sequence[Scenario]`): The scenarios.
        system (`str`, *optional*): A system prompt.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `list[dict[str, float]]`: Per scenario, reply key -> nats per token.
    """
    found = []
    with torch.inference_mode():
        for scenario in progress(scenarios, "replies"):
            encoded = encode(tokenizer, scenario, system)
            found.append(dict(zip(encoded.keys, reply_log_probs(model, encoded).tolist(), strict=True)))
    return found


def contrast(keys: Sequence[str], value: str, leave_out: Sequence[str] = ()) -> list[float] | None:
    """The weights that turn a scenario's log-probabilities into the margin of a value.

    Margin (DESIGN section 2): the log-probability per token of the value's reply minus the mean of the other replies'.
    For a single trait the other reply is the one that opposes it (`-value`), where there is one.

    Args:
        keys (`Sequence[str]`): The keys of the scenario's replies.
        value (`str`): The value.
        leave_out (`Sequence[str]`): Values whose replies do not take part (for observing one value while another is
            the target, whose rise would otherwise read as the fall of all others).

    Returns:
        `list[float]` or `None`: One weight per key, or `None` where the scenario says nothing about the value.

    Example:

    ```py
    >>> from neva_hf.measure import contrast
    >>> contrast(["power", "security", "tradition"], "security")
    [-0.5, 1.0, -0.5]
    ```
    """
    if value not in keys:
        return None
    opposed = f"-{value}"
    competing = [key for key in keys if key != value and key.removeprefix("-") not in leave_out]
    others = [opposed] if opposed in keys else competing
    if not others:
        return None
    return [1.0 if key == value else -1.0 / len(others) if key in others else 0.0 for key in keys]


def margins(log_probs: Sequence[Mapping[str, float]], value: str, leave_out: Sequence[str] = ()) -> list[float]:
    """The margins of a value in the scenarios that have a reply of it.

    Args:
        log_probs (`Sequence[Mapping[str, float]]`): From [`scenario_log_probs`].
        value (`str`): The value.
        leave_out (`Sequence[str]`): See [`contrast`].

    Returns:
        `list[float]`: Nats per token, one per scenario that says something about the value.
    """
    found = []
    for row in log_probs:
        weights = contrast(list(row), value, leave_out)
        if weights is not None:
            found.append(sum(weight * log_prob for weight, log_prob in zip(weights, row.values(), strict=True)))
    return found


@dataclass(frozen=True)
class Damage:
    """What strengths cost on some text.

    Args:
        kl (`float`): Mean KL divergence from the base model, nats per token.
        perplexity_ratio (`float`): Perplexity over the base model's on the same text.
        tokens (`int`): How many tokens it was measured on.
    """

    kl: float
    perplexity_ratio: float
    tokens: int


def damage(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    strengths: Sequence[Strengths],
    *,
    max_tokens: int = 160,
    progress: Progress[str] = no_progress,
) -> list[Damage]:
    """KL divergence from the base model and perplexity, for several settings of the dials at once.

    Each text is run once at strength 0 and once for each of the settings, as rows of one batch, or of several where the
    logits of all would take more than a gigabyte.

    Args:
        model (`nn.Module`): A model with NeVA layers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Neutral texts.
        strengths (`Sequence[Strengths]`): The settings.
        max_tokens (`int`): Of each text, at most so many tokens from the front.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `list[Damage]`: One per setting. KL is D(base || edited), the mean over tokens.
    """
    kl = torch.zeros(len(strengths), dtype=torch.float64)
    loss = torch.zeros(len(strengths) + 1, dtype=torch.float64)
    tokens = 0
    device = _device(model)
    with torch.inference_mode():
        for text in progress(texts, "neutral text"):
            ids = torch.tensor([tokenizer(text)["input_ids"][:max_tokens]], device=device)
            if ids.shape[1] < 2:
                continue
            rows = [{}, *strengths]
            size = max(_MAX_LOGITS // (ids.shape[1] * _text_config(model).vocab_size), 1)
            for start in range(0, len(rows), size):
                here = rows[start : start + size]
                with dialled(model, here, rows=len(here)):
                    logits = model(input_ids=ids.expand(len(here), -1), use_cache=False).logits[:, :-1]
                for number, row in enumerate(logits, start=start):
                    log_probs = row.float().log_softmax(-1)
                    if number == 0:
                        base, probabilities = log_probs, log_probs.exp()
                    else:
                        # (probability 0 times log-probability -inf would be no number)
                        gap = torch.where(probabilities > 0, probabilities * (base - log_probs), 0.0)
                        kl[number - 1] += gap.sum().double().cpu()
                    loss[number] -= log_probs.gather(1, ids[0, 1:, None]).sum().double().cpu()
            tokens += ids.shape[1] - 1
    if tokens == 0:
        raise NeVAError("The texts to measure damage on hold fewer than two tokens.")
    return [
        Damage(
            kl=max(float(kl[number]) / tokens, 0.0),
            # (torch's exponential is infinite where that of `math` raises)
            perplexity_ratio=float(((loss[number + 1] - loss[0]) / tokens).exp()),
            tokens=tokens,
        )
        for number in range(len(strengths))
    ]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
