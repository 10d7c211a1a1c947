"""Gains as a LoRA adapter for llama.cpp, which takes one together with a control vector.

llama.cpp adds `alpha / rank * B @ A @ x` to the output of the down projection itself, with the rank read from each pair
of tensors, and a control vector to what the block writes to the residual stream. Where a block adds the one to the other
unchanged, both together are the edit.

Invariant: with alpha 1, the second factor of each block is written times its rank, so that blocks may differ in it.

Source: `convert_lora_to_gguf.py`, `src/llama-adapter.cpp` and `build_lora_mm` in `src/llama-graph.cpp` of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .result import Origin

_ALPHA = 1.0
_NOTE = "neva.export"


def lora_file(file: Path) -> Path:
    """Where the adapter is that goes with a control vector.

    Args:
        file (`pathlib.Path`): The control vector.

    Returns:
        `pathlib.Path`: The file beside it.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from neva_hf.export.gguf_lora import lora_file
    >>> lora_file(Path("kind.gguf")).name
    'kind-lora.gguf'
    ```
    """
    return file.with_name(f"{file.stem}-lora{file.suffix}")


def write_adapter(
    file: Path, architecture: str, factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]], origin: Origin
) -> None:
    """Writes a LoRA adapter on the FFN down projections.

    Args:
        file (`pathlib.Path`): Where to.
        architecture (`str`): What llama.cpp calls the base model's architecture; it loads the adapter on no other.
        factors (`Mapping[int, tuple[torch.Tensor, torch.Tensor]]`): Number of the block, from 0 -> float32 `[k, d_ff]` and
            `[hidden, k]`, whose product is added to the weight.
        origin ([`Origin`]): Where the export came from.
    """
    from gguf import GGUFWriter

    told = origin.to_dict("gguf")
    writer = GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", _ALPHA)
    writer.add_name("The gains of a value edit as a LoRA adapter")
    writer.add_string(_NOTE, json.dumps(told))
    for number, (first, second) in factors.items():
        rank = len(first)
        name = f"blk.{number}.ffn_down.weight"
        writer.add_tensor(f"{name}.lora_a", first.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", (second * (rank / _ALPHA)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(file: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Reads what [`write_adapter`] wrote, as llama.cpp does.

    Args:
        file (`pathlib.Path`): A GGUF.

    Returns:
        `dict[int, tuple[torch.Tensor, torch.Tensor]]`: Number of the block -> float32 `[k, d_ff]` and `[hidden, k]`, with
        alpha / rank in the second, so that their product is what is added to the weight.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    found = {}
    for name, first in tensors.items():
        whole, _, part = name.rpartition(".")
        if part == "lora_a":
            second = tensors[f"{whole}.lora_b"]
            found[int(whole.split(".")[1])] = first, second * (alpha / second.shape[1])
    return found


def gain_hook(first: torch.Tensor, second: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    """A forward hook for a down projection that adds what the adapter adds.

    Args:
        first (`torch.Tensor`): Float32 `[k, d_ff]`.
        second (`torch.Tensor`): Float32 `[hidden, k]`.

    Returns:
        `Callable`: The hook.
    """

    def hook(projection: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        picked = inputs[0].float() @ first.to(output.device).T
        return output + (picked @ second.to(output.device).T).to(output.dtype)

    return hook


def forget_adapter(file: Path) -> None:
    """Removes the adapter that an earlier export left, where the new control vector has none: it would not belong to it.

    Args:
        file (`pathlib.Path`): What [`lora_file`] returned. A file that no export made stays.
    """
    if not file.is_file():
        return
    with file.open("rb") as opened:
        ours = _NOTE.encode() in opened.read(4096)
    if ours:
        file.unlink()
