"""Neuron maps without their base model: read, check, write, cut and compare.

A map on disk is a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`. It may come from a stranger, so
everything is checked before it is used, and nothing but JSON and safetensors is ever read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import NeVAConfig, check_value_names
from .errors import NeVAError
from .strengths import unknown_value_message

if TYPE_CHECKING:
    from torch import nn

    from .model import NeVAModel

PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 16 * 2**20
MAX_TENSOR_BYTES = 2**30

_TENSORS = ("index", "shift", "gain", "gate_weight", "gate_bias")


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


@dataclass
class NeuronMap:
    """All edits for all values on one base model.

    Args:
        config ([`NeVAConfig`]): Values, modules, strength units and ranges, provenance.
        modules (`dict[str, ModuleEdits]`): Down projection -> its edits.

    Raises:
        `NeVAError`: If the tensors do not fit the config or each other.

    Example:

    ```py
    >>> from neva_hf import NeuronMap
    >>> neuron_map = NeuronMap.from_pretrained("user/neva-...")  # doctest: +SKIP
    >>> neuron_map.values  # doctest: +SKIP
    ['benevolence', 'power']
    ```
    """

    config: NeVAConfig
    modules: dict[str, ModuleEdits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules or "" in self.modules:
            raise NeVAError("A neuron map needs at least one edited module, and each needs a name.")
        for name, edits in self.modules.items():
            _check_module(name, edits, self.config)
        counts = {name: int(edits.index.numel()) for name, edits in self.modules.items()}
        self.config = replace(self.config, neurons=counts, target_modules=list(self.modules), inference_mode=True)

    @property
    def values(self) -> list[str]:
        """The values, in the order of the tensors' rows."""
        return self.config.values

    @property
    def base_model(self) -> str | None:
        """The name of the base model that the map was made for."""
        return self.config.base_model_name_or_path

    def neurons(self, value: str) -> dict[str, torch.Tensor]:
        """The neurons that one value edits.

        Args:
            value (`str`): Its name.

        Returns:
            `dict[str, torch.Tensor]`: Module name -> sorted input features (int32), without modules that it leaves alone.

        Raises:
            `NeVAError`: If the map does not have the value.
        """
        row = self._row(value)
        found = {}
        for name, edits in self.modules.items():
            touched = edits.shift[row] != 0
            if edits.gain is not None:
                touched = touched | (edits.gain[row] != 0)
            if bool(touched.any()):
                found[name] = edits.index[touched].sort().values
        return found

    def neuron_counts(self) -> dict[str, dict[str, int]]:
        """How many neurons each value edits in each module.

        Returns:
            `dict[str, dict[str, int]]`: Value -> module name -> count.
        """
        return {value: {name: len(index) for name, index in self.neurons(value).items()} for value in self.values}

    def select(self, values: Sequence[str]) -> NeuronMap:
        """A map with some of the values, and only the neurons that they edit, or that their gates read.

        Args:
            values (`Sequence[str]`): Which, in the order that the new map has them.

        Returns:
            [`NeuronMap`]: A new map; the tensors are copies.

        Raises:
            `NeVAError`: If one is not in this map, or none of them edits anything.
        """
        values = check_value_names(values)
        rows = [self._row(value) for value in values]
        modules = {}
        for name, edits in self.modules.items():
            used = (edits.shift[rows] != 0).any(0)
            if edits.gain is not None:
                used |= (edits.gain[rows] != 0).any(0)
            if not bool(used.any()):
                continue
            if edits.gate_weight is not None:
                used |= (edits.gate_weight[rows] != 0).any(0)
            modules[name] = ModuleEdits(
                index=edits.index[used].clone(),
                shift=edits.shift[rows][:, used].clone(),
                gain=None if edits.gain is None else edits.gain[rows][:, used].clone(),
                gate_weight=None if edits.gate_weight is None else edits.gate_weight[rows][:, used].clone(),
                gate_bias=None if edits.gate_bias is None else edits.gate_bias[rows].clone(),
            )
        if not modules:
            raise NeVAError(f"In this map {', '.join(values)} edits no neuron, so there is nothing to select.")
        kept = set(values)
        config = replace(
            self.config,
            values=list(values),
            target_modules=None,
            neurons=8,
            units={name: pair for name, pair in self.config.units.items() if name in kept},
            ranges={name: pair for name, pair in self.config.ranges.items() if name in kept},
            default_strengths={name: s for name, s in self.config.default_strengths.items() if name in kept},
        )
        return NeuronMap(config, modules)

    def overlap(self, other: NeuronMap | None = None) -> dict[tuple[str, str], float]:
        """How much the neurons of two values have in common, within a map or between two.

        Args:
            other ([`NeuronMap`], *optional*): The map of the second value; this one when `None`.

        Returns:
            `dict[tuple[str, str], float]`: (value here, value there) -> neurons in both over neurons in either, 0 to 1.
        """
        other = other or self
        here = {value: set(_pairs(self.neurons(value))) for value in self.values}
        there = {value: set(_pairs(other.neurons(value))) for value in other.values}
        return {
            (one, two): len(first & second) / max(len(first | second), 1)
            for one, first in here.items()
            for two, second in there.items()
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by their names on disk, as PEFT writes them."""
        return {
            f"{PREFIX}{name}.neva_{key}": tensor.contiguous()
            for name, edits in self.modules.items()
            for key, tensor in edits.tensors().items()
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the map as a PEFT adapter.

        Both files are written elsewhere first, and the config is put in place last: whoever comes after a crash finds a
        whole map or none.

        Args:
            folder (`str` or `os.PathLike`): Made if it is not there.

        Returns:
            `pathlib.Path`: The folder.

        Raises:
            `NeVAError`: If the path is a file.
        """
        folder = Path(folder)
        if folder.is_file():
            raise NeVAError(f"{folder} is a file; give a folder to save the neuron map in.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".neva-", dir=folder) as unfinished:
            save_file(self.state_dict(), Path(unfinished, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
            self.config.save_pretrained(unfinished)
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                os.replace(Path(unfinished, name), folder / name)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> NeuronMap:
        """Reads a map from a folder or from the Hub, and checks it.

        Args:
            folder_or_repo (`str` or `os.PathLike`): A folder, or the id of a Hub repository.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            subfolder (`str`, *optional*): Where in the folder or repository the map is.
            token (`str` or `bool`, *optional*): A Hub token, for private repositories.
            cache_dir (`str` or `os.PathLike`, *optional*): In place of the Hub's cache folder.
            local_files_only (`bool`): Whether to use the cache alone.

        Returns:
            [`NeuronMap`]: The map.

        Raises:
            `NeVAError`: If there is no map, or it is not sound.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        config_file = _find(folder_or_repo, CONFIG_NAME, subfolder, hub)
        config = read_config(config_file)
        return cls(config, read_modules(_find(folder_or_repo, SAFETENSORS_WEIGHTS_NAME, subfolder, hub), config))

    @classmethod
    def from_model(cls, model: nn.Module, adapter_name: str = "default") -> NeuronMap:
        """Takes the map out of a model that has it loaded.

        Args:
            model (`nn.Module`): A model with NeVA layers.
            adapter_name (`str`): Which of its adapters.

        Returns:
            [`NeuronMap`]: A copy, on the CPU.

        Raises:
            `NeVAError`: If the model has no such adapter.
        """
        from .dial import neva_layers

        modules: dict[str, ModuleEdits] = {}
        config: NeVAConfig | None = None
        for layer in neva_layers(model):
            if adapter_name not in layer.neva_shift:
                continue
            config = layer.neva_configs[adapter_name]
            found = {}
            for key in _TENSORS:
                if adapter_name in getattr(layer, f"neva_{key}"):
                    dtype = torch.int32 if key == "index" else torch.float32
                    found[key] = layer.tensor(key, adapter_name).detach().to("cpu", dtype, copy=True)
            modules[layer.module_name] = ModuleEdits(**found)
        if config is None:
            raise NeVAError(f"The model has no NeVA adapter named {adapter_name!r}.")
        return cls(replace(config), modules)

    def apply_to(self, model: nn.Module, adapter_name: str = "default") -> NeVAModel:
        """Puts the map on its base model.

        Args:
            model (`nn.Module`): The base model; it is changed in place.
            adapter_name (`str`): The name that the adapter gets.

        Returns:
            [`NeVAModel`]: The model, with all strengths as the config's `default_strengths` say.

        Raises:
            `NeVAError`: If the map does not fit the model.
        """
        from .model import NeVAModel

        return NeVAModel.from_map(model, self, adapter_name)

    def _row(self, value: str) -> int:
        if value not in self.values:
            raise NeVAError(unknown_value_message(value, self.values))
        return self.values.index(value)


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
                if not key.startswith(PREFIX) or tensor not in _TENSORS:
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
    >>> from neva_hf.neuron_map import natural_order
    >>> sorted(["layers.10", "layers.9"], key=natural_order)
    ['layers.9', 'layers.10']
    ```
    """
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def _check_module(name: str, edits: ModuleEdits, config: NeVAConfig) -> None:
    count, number_of_values = edits.index.numel(), len(config.values)
    if edits.index.dtype != torch.int32 or edits.index.dim() != 1 or count == 0:
        raise NeVAError(f"neva_index of {name!r} must be a list of int32, got {_shape(edits.index)}.")
    if int(edits.index.min()) < 0 or len(edits.index.unique()) != count:
        raise NeVAError(f"neva_index of {name!r} must name each neuron once, by a number of at least 0.")
    d_ff = (config.base or {}).get("intermediate_size")
    if isinstance(d_ff, int) and int(edits.index.max()) >= d_ff:
        raise NeVAError(f"neva_index of {name!r} names neuron {int(edits.index.max())}, but there are only {d_ff}.")
    sizes = dict.fromkeys(("shift", "gain", "gate_weight"), (number_of_values, count))
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


def _pairs(neurons: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
    for name, index in neurons.items():
        for neuron in index.tolist():
            yield name, neuron


def _find(where: str | os.PathLike[str], filename: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
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
