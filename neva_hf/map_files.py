"""The files of a neuron map: read and checked.

Invariants: a map may come from a stranger, so nothing but JSON and safetensors is ever opened, whatever lies beside
them; names, dtypes and shapes are checked against the config before a tensor is read, and the numbers before they are
used; and whatever is wrong comes out as a `NeVAError`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .config import NeVAConfig
from .config_checks import MAX_MODULES, check_module_name
from .errors import NeVAError
from .module_edits import PREFIX, TENSORS, ModuleEdits, check_module, check_shapes
from .strict_json import read_json_object
from .tensor_header import TensorInfo, read_header

__all__ = ["PREFIX", "TENSORS", "ModuleEdits", "check_module", "natural_order", "read_config", "read_modules"]

MAX_CONFIG_BYTES = 16 * 2**20
MAX_TENSOR_BYTES = 2**30

_DTYPES = {"I32": torch.int32, "F32": torch.float32}
# What other programs would load in place of the weights. Reading a pickle may run code.
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", "adapter_model.pkl")


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields of an `adapter_config.json`, without looking at what they say.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `dict[str, Any]`: Field -> what it holds.

    Raises:
        `NeVAError`: If the file is too large, no sound JSON, not NeVA's, or has fields that are not known.
    """
    path = Path(path)
    loaded = read_json_object(path, MAX_CONFIG_BYTES)
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
    return loaded


def read_config(path: str | os.PathLike[str]) -> NeVAConfig:
    """Reads and checks an `adapter_config.json` of a neuron map.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        [`NeVAConfig`]: The configuration.

    Raises:
        `NeVAError`: See [`read_fields`], or if a field cannot be used.
    """
    loaded = read_fields(path)
    if isinstance(loaded.get("target_modules"), str):
        # A regular expression of a stranger is neither compiled nor run: the tensors name their modules.
        loaded["target_modules"] = None
    try:
        return NeVAConfig(**{key: value for key, value in loaded.items() if key != "peft_type"})
    except NeVAError:
        raise
    except (TypeError, ValueError) as error:
        raise NeVAError(f"{Path(path).name} cannot be used: {error}") from error


def read_modules(path: str | os.PathLike[str], config: NeVAConfig) -> dict[str, ModuleEdits]:
    """Reads the tensors of a neuron map.

    Args:
        path (`str` or `os.PathLike`): An `adapter_model.safetensors`.
        config ([`NeVAConfig`]): Its configuration.

    Returns:
        `dict[str, ModuleEdits]`: Module name -> edits, in the natural order of modules.

    Raises:
        `NeVAError`: For a damaged file, strange keys, wrong dtypes or sizes. What the numbers are is not looked at.
    """
    path = Path(path)
    announced = check_header(path, config)
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for module, tensors in announced.items():
                for name, info in tensors.items():
                    # (a copy, since the file may be replaced while the map is in use)
                    tensor = file.get_tensor(f"{PREFIX}{module}.neva_{name}").clone()
                    if tuple(tensor.shape) != info.shape or tensor.dtype != _DTYPES[info.dtype]:
                        raise NeVAError(f"{path.name} was changed while it was read: try again.")
                    found.setdefault(module, {})[name] = tensor
    except (SafetensorError, OSError) as error:
        raise NeVAError(
            f"{path.name} is not a sound safetensors file ({error}); the neuron map is damaged."
        ) from error
    return {module: ModuleEdits(**found[module]) for module in sorted(found, key=natural_order)}


def check_header(path: str | os.PathLike[str], config: NeVAConfig) -> dict[str, dict[str, TensorInfo]]:
    """Checks what the weights' file announces, before a tensor of it is read.

    Args:
        path (`str` or `os.PathLike`): An `adapter_model.safetensors`.
        config ([`NeVAConfig`]): Its configuration.

    Returns:
        `dict[str, dict[str, TensorInfo]]`: Module name -> tensor name, such as `shift` -> dtype and shape.

    Raises:
        `NeVAError`: For a file that is too large or damaged, strange keys, wrong dtypes, sizes that do not fit the config
            or each other, and a pickle beside the file.
    """
    path = Path(path)
    refuse_pickles(path.parent)
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in read_header(path, MAX_TENSOR_BYTES).items():
        module, _, tensor = key.rpartition(".neva_")
        if not key.startswith(PREFIX) or tensor not in TENSORS:
            raise NeVAError(f"{path.name} holds {key!r:.120}, which is no tensor of a neuron map.")
        wanted = "I32" if tensor == "index" else "F32"
        if info.dtype != wanted:
            raise NeVAError(f"{key:.600} must be {wanted}, got {info.dtype}.")
        found.setdefault(module.removeprefix(PREFIX), {})[tensor] = info
    if len(found) > MAX_MODULES:
        raise NeVAError(f"{path.name} edits {len(found)} modules, and a neuron map may edit {MAX_MODULES}.")
    for module, tensors in found.items():
        missing = [key for key in ("index", "shift") if key not in tensors]
        if missing:
            raise NeVAError(f"The neuron map has no neva_{missing[0]} for {module!r:.600}; it is damaged.")
        check_module_name(path.name, module)
        if tensors["index"].numel != config.neurons_in(module):
            raise NeVAError(
                f"{path.name} edits {tensors['index'].numel} neurons of {module!r}, its config says "
                f"{config.neurons_in(module)}: the two files are not of the same map."
            )
        check_shapes(module, {key: info.shape for key, info in tensors.items()}, config)
    if isinstance(config.neurons, dict) and config.neurons.keys() != found.keys():
        raise NeVAError(f"{path.name} edits other modules than its config says: they are not of the same map.")
    return found


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder that has a pickle where a map has its safetensors file, or beside it.

    It would not be opened here; but other programs may take it for the map.
    """
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles:
        raise NeVAError(
            f"{pickles[0]} lies in the folder of the neuron map: it is a pickle, and reading one may run code. A map is "
            f"{CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}; delete the pickle if you trust these two."
        )


def check_for_peft(where: str | os.PathLike[str], subfolder: str | None, hub: Mapping[str, Any]) -> list[str] | None:
    """Looks at both files of a map before PEFT reads them itself.

    PEFT then reads the same files (from the Hub: through the same cache), and the tuner checks the numbers when they
    reach it. What cannot be checked from here: PEFT parses the config once before it asks this class; from the Hub, PEFT
    takes the files of the branch as it is a moment later (pass a commit as `revision`); and the `load_adapter` of
    transformers asks neither this function nor the tuner, so there only the config's fields are checked when it is
    loaded, and the numbers when it is dialled. [`NeVAModel.from_pretrained`] checks everything.

    Args:
        where (`str` or `os.PathLike`): A folder, or the id of a Hub repository.
        subfolder (`str`, *optional*): Where in it.
        hub (`Mapping[str, Any]`): What PEFT was given, with `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `list[str]`: The modules that the map edits; `None` for a folder with a config alone.

    Raises:
        `NeVAError`: If the map is not sound.
    """
    from .hub_files import find_map  # (built on this file)

    folder = Path(where, subfolder or "")
    if folder.is_dir():
        refuse_pickles(folder)
        if (folder / CONFIG_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            return None
    options = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if hub.get(key) is not None}
    files = find_map(where, hub.get("revision"), subfolder, options)
    return list(check_header(files.tensors, read_config(files.config)))


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
