"""The files of a neuron map: found, read and checked.

A map may come from a stranger, so everything is checked before it is used, nothing but JSON and safetensors is ever
read, and whatever is wrong comes out as a `NeVAError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .config import NeVAConfig
from .errors import NeVAError

PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 16 * 2**20
MAX_TENSOR_BYTES = 2**30

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


def read_config(path: str | os.PathLike[str]) -> NeVAConfig:
    """Reads and checks an `adapter_config.json` of a neuron map.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        [`NeVAConfig`]: The configuration.

    Raises:
        `NeVAError`: If the file is too large, no JSON, not NeVA's, or has fields that cannot be used.
    """
    path = Path(path)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise NeVAError(f"{path.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB; that is no config of a neuron map.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NeVAError(f"{path.name} is not valid JSON ({error}); the neuron map is damaged.") from error
    if not isinstance(loaded, Mapping):
        raise NeVAError(f"{path.name} must hold a JSON object, got {type(loaded).__name__}.")
    if loaded.get("peft_type") != "NEVA":
        raise NeVAError(
            f"This is a PEFT adapter of the type {loaded.get('peft_type')!r:.40}, not a neuron map ('NEVA'). Load it "
            "with peft.PeftModel.from_pretrained."
        )
    known = {item.name for item in fields(NeVAConfig)}
    unknown = sorted(str(key)[:40] for key in loaded if key not in known)
    if unknown:
        raise NeVAError(
            f"{path.name} has fields that this version does not know: {', '.join(unknown[:5])}. If the map was made by a "
            "newer version, update with `pip install -U neva-hf`."
        )
    try:
        return NeVAConfig(**{key: value for key, value in loaded.items() if key != "peft_type"})
    except NeVAError:
        raise
    except (TypeError, ValueError) as error:
        raise NeVAError(f"{path.name} cannot be used: {error}") from error


def read_modules(path: str | os.PathLike[str], config: NeVAConfig) -> dict[str, ModuleEdits]:
    """Reads the tensors of a neuron map.

    Args:
        path (`str` or `os.PathLike`): An `adapter_model.safetensors`.
        config ([`NeVAConfig`]): Its configuration.

    Returns:
        `dict[str, ModuleEdits]`: Module name -> edits, in the file's order of modules.

    Raises:
        `NeVAError`: For a damaged file, strange keys, wrong dtypes or sizes.
    """
    path = Path(path)
    if path.stat().st_size > MAX_TENSOR_BYTES:
        raise NeVAError(f"{path.name} is larger than {MAX_TENSOR_BYTES >> 30} GiB; that is no neuron map.")
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                module, _, tensor = key.rpartition(".neva_")
                if not key.startswith(PREFIX) or tensor not in TENSORS:
                    raise NeVAError(f"{path.name} holds {key!r:.120}, which is no tensor of a neuron map.")
                wanted = "I32" if tensor == "index" else "F32"
                if file.get_slice(key).get_dtype() != wanted:
                    raise NeVAError(f"{key} must be {wanted}, got {file.get_slice(key).get_dtype()}.")
                found.setdefault(module.removeprefix(PREFIX), {})[tensor] = file.get_tensor(key)
    except SafetensorError as error:
        raise NeVAError(
            f"{path.name} is not a sound safetensors file ({error}); the neuron map is damaged."
        ) from error
    for module, tensors in found.items():
        missing = [key for key in ("index", "shift") if key not in tensors]
        if missing:
            raise NeVAError(f"The neuron map has no neva_{missing[0]} for {module!r}; it is damaged.")
        if tensors["index"].numel() != config.neurons_in(module):
            raise NeVAError(
                f"{path.name} edits {tensors['index'].numel()} neurons of {module!r}, its config says "
                f"{config.neurons_in(module)}: the two files are not of the same map."
            )
    if isinstance(config.neurons, dict) and config.neurons.keys() != found.keys():
        raise NeVAError(f"{path.name} edits other modules than its config says: they are not of the same map.")
    return {module: ModuleEdits(**found[module]) for module in sorted(found, key=natural_order)}


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts `layers.10` after `layers.9`.

    Example:

    ```py
    >>> from neva_hf.map_files import natural_order
    >>> sorted(["layers.10", "layers.9"], key=natural_order)
    ['layers.9', 'layers.10']
    ```
    """
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def check_module(name: str, edits: ModuleEdits, config: NeVAConfig) -> None:
    """Refuses edits of one module that do not fit their config or each other."""
    count, number_of_values = edits.index.numel(), len(config.values)
    if edits.index.dtype != torch.int32 or edits.index.dim() != 1 or count == 0:
        raise NeVAError(f"neva_index of {name!r} must be a list of int32, got {_shape(edits.index)}.")
    if int(edits.index.min()) < 0 or len(edits.index.unique()) != count:
        raise NeVAError(f"neva_index of {name!r} must name each neuron once, by a number of at least 0.")
    d_ff = (config.base or {}).get("intermediate_size")
    if isinstance(d_ff, int) and int(edits.index.max()) >= d_ff:
        raise NeVAError(f"neva_index of {name!r} names neuron {int(edits.index.max())}, but there are only {d_ff}.")
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("shift", "gain", "gate_weight"), (number_of_values, count))
    sizes["gate_bias"] = (number_of_values,)
    for key, tensor in edits.tensors().items():
        if key == "index":
            continue
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != sizes[key]:
            raise NeVAError(f"neva_{key} of {name!r} must be float32 {list(sizes[key])}, got {_shape(tensor)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise NeVAError(f"neva_{key} of {name!r} holds numbers that are not finite.")
    has_gate = edits.gate_weight is not None and edits.gate_bias is not None
    one_gate = edits.gate_weight is not None or edits.gate_bias is not None
    if (edits.gain is not None) != config.use_gain or has_gate != config.use_gate or one_gate != has_gate:
        raise NeVAError(
            f"{name!r} has the tensors {sorted(edits.tensors())}, which do not fit use_gain={config.use_gain} and "
            f"use_gate={config.use_gate} of the config."
        )


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def find_file(where: str | os.PathLike[str], filename: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """A file of a map, from a folder or from the Hub (through its cache)."""
    folder = Path(where, subfolder or "")
    if Path(where).is_dir():
        if not (folder / filename).is_file():
            raise NeVAError(f"There is no neuron map in {folder}: {filename} is missing.")
        return folder / filename
    if Path(where).exists():
        raise NeVAError(f"{where} is a file; give the folder of a neuron map, or the id of a Hub repository.")
    try:
        return Path(hf_hub_download(str(where), filename, subfolder=subfolder, **hub))
    except HFValidationError as error:
        raise NeVAError(f"There is no folder {where}, and it cannot be the id of a Hub repository.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NeVAError(
            f"No neuron map was found at {where!s}: there is no such folder, and from the Hub came: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
