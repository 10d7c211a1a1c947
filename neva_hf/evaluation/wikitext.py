"""Perplexity on windows of WikiText-2, beside the base model, and the KL divergence between the two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import text_config
from neva_hf.baselines.hooks import neutral
from neva_hf.baselines.method import Dials, Method
from neva_hf.errors import NeVAError
from neva_hf.measure import Progress, no_progress

WINDOW = 512
_MAX_LOGITS = 2**28


@dataclass(frozen=True)
class WikiText:
    """Perplexity of one setting.

    Args:
        base (`float`): The base model's perplexity per token, `exp(mean negative log-probability)`.
        perplexity (`float`): That under the dials.
        ratio (`float`): The one over the other.
        kl (`float`): D(base || dialled), the mean over tokens, nats.
        tokens (`int`): How many tokens were predicted.
    """

    base: float
    perplexity: float
    ratio: float
    kl: float
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """As plain data."""
        return asdict(self)


def wikitext_windows(
    tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike[str], windows: int = 20, window: int = WINDOW
) -> list[list[int]]:
    """The first windows of a text, cut without overlap, each behind the beginning-of-text token if the model has one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        path (`str` or `os.PathLike`): A text file, such as WikiText-2's `test.txt`.
        windows (`int`): At most so many.
        window (`int`): The length of each, in tokens.

    Returns:
        `list[list[int]]`: Token ids.

    Raises:
        `NeVAError`: If the file cannot be read or is shorter than one window.
    """
    if windows < 1 or window < 2:
        raise NeVAError(f"At least 1 window of 2 tokens is needed, got {windows} of {window}.")
    wanted = windows * window
    try:
        # Far more characters than the windows can need, and less than all of a long file.
        text = Path(path).read_text(encoding="utf-8")[: wanted * 12]
    except (OSError, UnicodeDecodeError) as error:
        raise NeVAError(f"The text to measure perplexity on cannot be read from {path}: {error}.") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:wanted]
    if len(ids) < window:
        raise NeVAError(f"{path} holds {len(ids)} tokens, fewer than one window of {window}.")
    start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    return [start + list(ids[at : at + window]) for at in range(0, len(ids) - window + 1, window)]


def wikitext_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Sequence[int]],
    method: Method,
    settings: Sequence[Dials],
    *,
    progress: Progress[Sequence[int]] = no_progress,
) -> list[WikiText]:
    """Perplexity and KL divergence of several settings of the dials.

    Each window is run once without dials and once for each setting; settings that share a system prompt are rows of one
    batch (or of several where the logits would take more than a gigabyte). A system prompt stands in front of the window,
    and its own tokens do not count.

    Args:
        model (`nn.Module`): The model that the method steers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        windows (`Sequence[Sequence[int]]`): From [`wikitext_windows`].
        method ([`Method`]): What steers.
        settings (`Sequence[Mapping[str, float]]`): Value -> strength, one mapping for each setting.
        progress ([`Progress`]): Shows how far it is.

    Returns:
        `list[WikiText]`: One for each setting.

    Raises:
        `NeVAError`: If there is no window.
    """
    if not windows:
        raise NeVAError("There is no window of text to measure perplexity on.")
    device = next(model.parameters()).device
    kl, loss = (torch.zeros(len(settings), dtype=torch.float64) for _ in range(2))
    base_loss, tokens = 0.0, 0
    together: dict[str | None, list[int]] = {}
    for number, dials in enumerate(settings):
        together.setdefault(method.system(dials) or None, []).append(number)
    with torch.inference_mode(), neutral(model):
        for window in progress(windows, "WikiText"):
            told = torch.tensor(list(window[1:]), device=device)[:, None]
            ids = torch.tensor([list(window)], device=device)
            base = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            probabilities = base.exp()
            base_loss -= float(base.gather(1, told).double().sum())
            for system, numbers in together.items():
                row = _behind(tokenizer, system, window)
                size = max(_MAX_LOGITS // (len(row) * text_config(model).vocab_size), 1)
                for at in range(0, len(numbers), size):
                    few = numbers[at : at + size]
                    rows = torch.tensor([row], device=device).expand(len(few), -1)
                    with method.at([settings[number] for number in few]):
                        logits = model(input_ids=rows, use_cache=False).logits[:, -len(window) : -1]
                    for number, here in zip(few, logits, strict=True):
                        dialled = here.float().log_softmax(-1)
                        # (probability 0 times log-probability -inf would be no number)
                        gap = torch.where(probabilities > 0, probabilities * (base - dialled), 0.0)
                        kl[number] += float(gap.double().sum())
                        loss[number] -= float(dialled.gather(1, told).double().sum())
            tokens += len(told)
    before = float(torch.tensor(base_loss / tokens, dtype=torch.float64).exp())
    return [
        WikiText(
            base=before,
            # (torch's exponential is infinite where that of `math` raises)
            perplexity=float((own / tokens).exp()),
            ratio=float(((own - base_loss) / tokens).exp()),
            kl=max(float(one) / tokens, 0.0),
            tokens=tokens,
        )
        for one, own in zip(kl, loss, strict=True)
    ]


def _behind(tokenizer: PreTrainedTokenizerBase, system: str | None, window: Sequence[int]) -> list[int]:
    """A window with a system prompt in front of it; a beginning-of-text token stays the first."""
    if system is None:
        return list(window)
    first = [window[0]] if window[0] == tokenizer.bos_token_id else []
    words = list(tokenizer(f"{system}\n\n", add_special_tokens=False)["input_ids"])
    return [*first, *words, *window[len(first) :]]
