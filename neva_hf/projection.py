"""What can be known of a down projection of whatever class: its sizes, where it computes, what its neurons write.

Invariant: a weight is only read where it is known to be the whole truth. Of every other layer (quantized, offloaded,
wrapped by another adapter) nothing is assumed but that it is linear; it is measured by running it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import NeVAError


def layer_sizes(base_layer: Any) -> tuple[int, int]:
    """The numbers of input and output features of a down projection.

    Args:
        base_layer (`nn.Module`): Linear, Conv1D, a quantized one, or one wrapped by another adapter.

    Returns:
        `tuple[int, int]`: (d_ff, hidden).

    Raises:
        `NeVAError`: If the module does not tell.

    Example:

    ```py
    >>> from torch import nn
    >>> from neva_hf.projection import layer_sizes
    >>> layer_sizes(nn.Linear(64, 16))
    (64, 16)
    ```
    """
    base = innermost(base_layer)
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    for inputs, outputs in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if hasattr(base, inputs) and hasattr(base, outputs):
            return int(getattr(base, inputs)), int(getattr(base, outputs))
    raise NeVAError(
        f"{type(base).__name__} does not tell its numbers of input and output features, so its inputs cannot be edited. "
        "`target_modules` must name FFN down projections (linear layers)."
    )


def innermost(layer: Any) -> Any:
    """The layer itself under all adapters that wrap it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def stored_weight(base_layer: Any) -> torch.Tensor:
    """The tensor that holds the weight, packed or not."""
    base = innermost(base_layer)
    return base.weight if getattr(base, "weight", None) is not None else base.qweight


def is_plain(base_layer: Any) -> bool:
    """Whether the layer is a linear map whose weight can be read: not quantized, wrapped or offloaded."""
    kind = type(base_layer)
    # (FalconLinear is nn.Linear with its matmul and its addition as two steps. Quantized ones are subclasses as well.)
    if kind not in (nn.Linear, Conv1D) and kind.__name__ != "FalconLinear":
        return False
    weight = base_layer.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    return plain and weight.is_floating_point() and weight.dtype.itemsize >= 2 and not weight.is_meta


def can_fuse(base_layer: Any) -> bool:
    """Whether the layer's matmul can be made without calling the layer. Hooks on it would be passed by then."""
    hooked = base_layer._forward_hooks or base_layer._forward_pre_hooks or hasattr(base_layer, "_hf_hook")
    return type(base_layer) is nn.Linear and is_plain(base_layer) and not hooked


def device_and_dtype(base_layer: Any) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype the layer computes, also where its weight is quantized or offloaded."""
    weight = stored_weight(base_layer)
    device, dtype = weight.device, getattr(innermost(base_layer), "compute_dtype", None) or weight.dtype
    if device.type == "meta":
        device = torch.device(getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None) or "cpu")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    return device, dtype


def columns(base_layer: Any, index: torch.Tensor) -> torch.Tensor:
    """What a unit of each given input feature writes to the output.

    Args:
        base_layer (`nn.Module`): The down projection.
        index (`torch.Tensor`): Input features, `[k]`.

    Returns:
        `torch.Tensor`: Float32 `[k, hidden]`. Read from the weight where it is a plain one, else measured by running the
        layer on one-hot rows.

    Example:

    ```py
    >>> import torch
    >>> from neva_hf.projection import columns
    >>> columns(torch.nn.Linear(64, 16), torch.tensor([3, 5])).shape
    torch.Size([2, 16])
    ```
    """
    with torch.inference_mode(False), torch.no_grad():
        if is_plain(base_layer):
            weight = base_layer.weight
            picked = index.to(weight.device, torch.int64)
            rows = weight[picked] if isinstance(base_layer, Conv1D) else weight[:, picked].T
            return rows.to(torch.float32, copy=True)
        device, dtype = device_and_dtype(base_layer)
        nothing = torch.zeros(1, 1, layer_sizes(base_layer)[0], device=device, dtype=dtype)
        at_rest = base_layer(nothing)[0].float()
        written = []
        for chunk in index.to(device, torch.int64).split(256):
            one_hot = nothing[0].repeat(len(chunk), 1)
            one_hot[torch.arange(len(chunk), device=device), chunk] = 1
            written.append(base_layer(one_hot[None])[0].float() - at_rest)
        return torch.cat(written)


def version(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Changes whenever the tensor is replaced, moved, cast or written to."""
    address = tensor.data_ptr() if type(tensor.data) is torch.Tensor else 0
    written = 0 if tensor.is_inference() else tensor._version
    return id(tensor), address, written, tensor.device, tensor.dtype
