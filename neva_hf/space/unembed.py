"""Which tokens a direction in the residual stream speaks for."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from neva_hf.architectures import decoder_blocks
from neva_hf.errors import NeVAError
from neva_hf.projection import device_and_dtype

# Special tokens and bytes of half a character say nothing to a reader.
_MORE = 40


def tokens_of(
    base: nn.Module, tokenizer: Any, module: str, direction: torch.Tensor, count: int
) -> tuple[list[str], list[str]]:
    """The tokens that a direction makes likelier, and those that it makes less likely.

    Args:
        base (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        module (`str`): The down projection that writes the direction: some models scale what it writes.
        direction (`torch.Tensor`): Float32 `[hidden]`.
        count (`int`): How many tokens of each.

    Returns:
        `tuple[list[str], list[str]]`: Plain text, with white space as it is; escape it.

    Raises:
        `NeVAError`: If the model has no unembedding that could be read.
    """
    logits = token_logits(base, module, direction)
    # (vocabularies are padded)
    logits = logits[: len(tokenizer)]
    order = logits.argsort(descending=True).tolist()
    special = set(tokenizer.all_special_ids)

    def readable(ids: list[int]) -> list[str]:
        texts = (str(tokenizer.decode([token])) for token in ids[: count + _MORE] if token not in special)
        return [text for text in texts if text.strip() and "\ufffd" not in text][:count]

    return readable(order), readable(order[::-1])


@torch.no_grad()
def token_logits(base: nn.Module, module: str, direction: torch.Tensor) -> torch.Tensor:
    """What a direction adds to the logit of every token, up to a factor: the final norm's own scale is left out.

    Args:
        base (`PreTrainedModel`): The model.
        module (`str`): The down projection that writes it.
        direction (`torch.Tensor`): Float32 `[hidden]`.

    Returns:
        `torch.Tensor`: Float32 `[vocabulary]`, on the CPU.

    Raises:
        `NeVAError`: If the model has no unembedding that could be read.
    """
    blocks_name, _ = decoder_blocks(base)
    head = base.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise NeVAError("This model has no unembedding, so no token can be told.")
    for norm in (_norm_behind(base, module, blocks_name), _final_norm(base, blocks_name)):
        if norm is not None:
            direction = _scaled(norm, direction)
    device, dtype = device_and_dtype(head)
    nothing = torch.zeros(1, 1, len(direction), device=device, dtype=dtype)
    try:
        # Run rather than read, since it may be quantized, and its bias is not the direction's.
        told = head(nothing + direction.to(device, dtype)) - head(nothing)
    except RuntimeError as error:
        raise NeVAError("The unembedding of this model has another width, so no token can be told.") from error
    return told[0, 0].float().cpu()


def _final_norm(base: nn.Module, blocks_name: str) -> nn.Module | None:
    """The norm behind the last block: of the norms beside the blocks, the last."""
    beside = base.get_submodule(blocks_name.rpartition(".")[0])
    norms = [child for child in beside.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def _norm_behind(base: nn.Module, module: str, blocks_name: str) -> nn.Module | None:
    """The norm between a feed-forward network and the residual stream, which Gemma 2 and 3 and OLMo 2 have."""
    block = re.match(re.escape(blocks_name) + r"\.\d+", module)
    return getattr(base.get_submodule(block[0]), "post_feedforward_layernorm", None) if block else None


def _scaled(norm: nn.Module, direction: torch.Tensor) -> torch.Tensor:
    weight: Any = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm):
        centred = direction - direction.mean()
        return centred if weight is None else centred * weight.float().to(direction.device)
    if not isinstance(weight, torch.Tensor):
        return direction
    # Norms by the root of the mean square leave a vector of ones as it is, so this is their factor, however it is kept
    # (Gemma's is one more than its weight).
    ones = torch.ones(1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)
    return direction * norm(ones)[0, 0].float().to(direction.device)
