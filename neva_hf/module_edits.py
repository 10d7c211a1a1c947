"""The edits of one module as tensors, and what is wrong with them.

Sizes and numbers are checked apart: sizes are known before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from .errors import NeVAError

if TYPE_CHECKING:
    from .config import NeVAConfig

PREFIX = "base_model.model."
TENSORS = ("index", "shift", "gain", "gate_weight", "gate_bias")


@dataclass(frozen=True, eq=False)
class ModuleEdits:
    """The edits of one down projection: `V` values, `k` neurons.

    Args:
        index (`torch.Tensor`): The edited input features, int32 `[k]`, each once.
        shift (`torch.Tensor`): Float32 `[V, k]`; 0 where a value leaves a neuron alone.
        gain (`torch.Tensor`, *optional*): Float32 `[V, k]`.
        gate_weight (`torch.Tensor`, *optional*): Float32 `[V, k]`.
        gate_bias (`torch.Tensor`, *optional*): Float32 `[V]`.
    """

    index: torch.Tensor
    shift: torch.Tensor
    gain: torch.Tensor | None = None
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by their names on disk without the prefix `neva_`."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleEdits):
            return NotImplemented
        here, there = self.tensors(), other.tensors()
        return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)

    __hash__ = None  # type: ignore[assignment]


def check_shapes(name: str, shapes: Mapping[str, tuple[int, ...]], config: NeVAConfig) -> None:
    """Refuses sizes of one module's tensors that do not fit their config or each other."""
    index = shapes["index"]
    if len(index) != 1 or index[0] == 0:
        raise NeVAError(f"neva_index of {name!r} must be a list of int32, got int32 {list(index)}.")
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("shift", "gain", "gate_weight"), (len(config.values), index[0]))
    sizes["gate_bias"] = (len(config.values),)
    for key, shape in shapes.items():
        if key != "index" and shape != sizes[key]:
            raise NeVAError(f"neva_{key} of {name!r} must be float32 {list(sizes[key])}, got float32 {list(shape)}.")
    has_gate = {"gate_weight", "gate_bias"} <= shapes.keys()
    one_gate = "gate_weight" in shapes or "gate_bias" in shapes
    if ("gain" in shapes) != config.use_gain or has_gate != config.use_gate or one_gate != has_gate:
        raise NeVAError(
            f"{name!r} has the tensors {sorted(shapes)}, which do not fit use_gain={config.use_gain} and "
            f"use_gate={config.use_gate} of the config."
        )


def check_numbers(name: str, tensors: Mapping[str, torch.Tensor], d_ff: int | None) -> None:
    """Refuses numbers of one module that cannot be used: neurons that are not there or named twice, and no finite edits.

    Args:
        name (`str`): The module, for messages.
        tensors (`Mapping[str, torch.Tensor]`): By their names without `neva_`; `index` is one.
        d_ff (`int`, *optional*): How many neurons the module has, where that is known.
    """
    index = tensors["index"]
    if int(index.min()) < 0 or len(index.unique()) != index.numel():
        raise NeVAError(f"neva_index of {name!r} must name each neuron once, by a number of at least 0.")
    if d_ff is not None and int(index.max()) >= d_ff:
        raise NeVAError(f"neva_index of {name!r} names neuron {int(index.max())}, but there are only {d_ff}.")
    for key, tensor in tensors.items():
        if key != "index" and not bool(torch.isfinite(tensor).all()):
            raise NeVAError(f"neva_{key} of {name!r} holds numbers that are not finite.")


def check_module(name: str, edits: ModuleEdits, config: NeVAConfig) -> None:
    """Refuses edits of one module that do not fit their config or each other."""
    tensors = edits.tensors()
    for key, tensor in tensors.items():
        wanted = torch.int32 if key == "index" else torch.float32
        if tensor.dtype != wanted:
            words = "a list of int32" if key == "index" else "float32"
            raise NeVAError(f"neva_{key} of {name!r} must be {words}, got {_shape(tensor)}.")
    check_shapes(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, config)
    check_numbers(name, tensors, (config.base or {}).get("intermediate_size"))


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
