"""Texts as numbers, for the text judge: embeddings, or what a language model makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neva_hf.architectures import text_config
from neva_hf.baselines.hooks import neutral
from neva_hf.errors import NeVAError

Features = Callable[[Sequence[str]], Any]
"""Texts -> float array `[texts, features]`."""

DEPTH = 0.8
_TOKENS, _BATCH = 128, 1024


def sentence_features(model: str | os.PathLike[str]) -> Features:
    """Features from a model of sentence-transformers.

    Args:
        model (`str` or `os.PathLike`): A folder, or a name on the Hub.

    Returns:
        `Callable`: Texts -> embeddings `[texts, dimensions]`.

    Raises:
        `NeVAError`: If sentence-transformers is missing or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise NeVAError("An embedder needs sentence-transformers: pip install sentence-transformers.") from error
    try:
        loaded = SentenceTransformer(str(model))
    except Exception as error:
        raise NeVAError(f"The embedder {str(model)!r} cannot be loaded: {error}.") from error
    return lambda texts: loaded.encode(list(texts), show_progress_bar=False)


def hidden_features(model: nn.Module, tokenizer: PreTrainedTokenizerBase, depth: float = DEPTH) -> Features:
    """Features from a language model: the mean over a text's tokens of the residual stream after one of its blocks.

    The text is read by itself, without its question, and with all dials at 0, so a text has the same features whatever
    made it. A caution: where the same model wrote the text under an edit, it is read by what was edited; the judge that
    reads words alone is there for comparison.

    Args:
        model (`nn.Module`): A causal language model of transformers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        depth (`float`): Which block, from 0 (the embeddings) to 1 (the last).

    Returns:
        `Callable`: Texts -> float32 `[texts, hidden]`. Of each text at most 128 tokens are read.

    Raises:
        `NeVAError`: If the depth is not between 0 and 1.
    """
    if not 0 <= depth <= 1:
        raise NeVAError(f"`depth` must be from 0 to 1, got {depth}.")
    layer = round(depth * text_config(model).num_hidden_layers)

    def features(texts: Sequence[str]) -> Any:
        device = next(model.parameters()).device
        rows = [list(tokenizer(text)["input_ids"][:_TOKENS]) for text in texts]
        # A beginning-of-text token holds the same, whatever follows.
        first = [int(len(row) > 1 and row[0] == tokenizer.bos_token_id) for row in rows]
        found: list[torch.Tensor] = [torch.zeros(text_config(model).hidden_size)] * len(rows)
        order = sorted((number for number, row in enumerate(rows) if row), key=lambda number: len(rows[number]))
        with torch.inference_mode(), neutral(model):
            while order:
                size = max(_BATCH // len(rows[order[-1]]), 1)
                batch, order = order[-size:], order[:-size]
                width = len(rows[batch[-1]])
                ids = torch.tensor([rows[one] + [0] * (width - len(rows[one])) for one in batch], device=device)
                mask = torch.tensor([[1] * len(rows[one]) + [0] * (width - len(rows[one])) for one in batch])
                output = model(
                    input_ids=ids,
                    attention_mask=mask.to(device),
                    output_hidden_states=True,
                    use_cache=False,
                    logits_to_keep=1,
                )
                for one, states in zip(batch, output.hidden_states[layer].float().cpu(), strict=True):
                    found[one] = states[first[one] : len(rows[one])].mean(0)
        return torch.stack(found).numpy() if found else torch.zeros(0, text_config(model).hidden_size).numpy()

    return features
