"""An edit with gains as a LoRA adapter of PEFT.

At fixed strengths, gains `g` add `W[:, index] @ diag(g) @ x[index]` to the output of a down projection, and shifts add a
constant. That is a LoRA adapter as it stands: `lora_A` picks the neurons, `lora_B` holds their columns times `g`, and its
bias is the constant.

Invariant: alpha is the rank in every module, so that PEFT's scaling (alpha / rank) is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from neva_hf.map_files import PREFIX

from .fixed import FixedEdit, gain_factors

_PICK, _WRITE, _SHIFT = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"


def lora_tensors(base: Any, edits: Mapping[str, FixedEdit]) -> dict[str, torch.Tensor]:
    """The tensors of the adapter, named as PEFT saves them.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, without NeVA layers.
        edits (`Mapping[str, FixedEdit]`): Down projection -> its edit.

    Returns:
        `dict[str, torch.Tensor]`: Per module float32 `lora_A` `[k, d_ff]`, `lora_B` `[hidden, k]` and its bias `[hidden]`.
        The rank `k` is the number of neurons that have a gain, and 1 (of zeros) where none has.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, edit in edits.items():
        pick, write = gain_factors(base.get_submodule(name), edit)
        if not len(pick):
            # PEFT has no rank of 0.
            pick, write = pick.new_zeros(1, pick.shape[1]), write.new_zeros(write.shape[0], 1)
        tensors |= {
            f"{PREFIX}{name}{_PICK}": pick,
            f"{PREFIX}{name}{_WRITE}": write,
            f"{PREFIX}{name}{_SHIFT}": edit.shift.contiguous(),
        }
    return tensors


def lora_config(tensors: Mapping[str, torch.Tensor], transposed: bool, **about: Any) -> LoraConfig:
    """The config that belongs to the tensors.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): What [`lora_tensors`] made.
        transposed (`bool`): Whether the down projections store their weights transposed, as GPT-2's Conv1D does.
        about (`Any`): What else the config says: the base model, its revision, the task.

    Returns:
        [`~peft.LoraConfig`]: For exactly these modules, each with its own rank.
    """
    ranks = {
        name.removeprefix(PREFIX).removesuffix(_PICK): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(_PICK)
    }
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks),
        lora_bias=True,
        bias="none",
        fan_in_fan_out=transposed,
        **about,
    )
