"""Neuron maps without their base model: read, write, cut and compare.

A map on disk is a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors` (map_files.py reads them).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .config import NeVAConfig, check_value_names
from .errors import NeVAError
from .hub_files import find_map
from .map_files import PREFIX, TENSORS, ModuleEdits, check_module, natural_order, read_config, read_modules
from .strengths import unknown_value_message

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import nn

    from .model import NeVAModel

__all__ = ["ModuleEdits", "NeuronMap", "natural_order"]


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
            check_module(name, edits, self.config)
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
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        files = find_map(folder_or_repo, revision, subfolder, hub)
        config = read_config(files.config)
        return cls(config, read_modules(files.tensors, config))

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
            for key in TENSORS:
                if adapter_name in getattr(layer, f"neva_{key}"):
                    dtype = torch.int32 if key == "index" else torch.float32
                    found[key] = layer.tensor(key, adapter_name).detach().to("cpu", dtype, copy=True)
            modules[layer.module_name] = ModuleEdits(**found)
        if config is None:
            raise NeVAError(f"The model has no NeVA adapter named {adapter_name!r}.")
        return cls(replace(config), modules)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        **card: Any,
    ) -> CommitInfo:
        """Puts the map on the Hub with its card. See [`~neva_hf.hub.push_to_hub`].

        Args:
            repo_id (`str`): The repository, such as `"user/neva-map"`; made if it is not there.
            private (`bool`, *optional*): Whether only you see it; what your account says when `None`.
            revision (`str`, *optional*): A branch, made if it is not there; main when `None`.
            subfolder (`str`, *optional*): Where in the repository.
            commit_message (`str`, *optional*): What is new.
            create_pr (`bool`): Whether to ask the owners by a pull request.
            token (`str` or `bool`, *optional*): A Hub token that may write; the one that you logged in with when `None`.
            card (`Any`): For the card: `base_model`, `license`, `datasets`, or `card=False`.

        Returns:
            `huggingface_hub.CommitInfo`: The commit, a `str` with its address.

        Raises:
            `NeVAError`: If it cannot be done; the repository is then as it was.
        """
        from .hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            private=private,
            revision=revision,
            subfolder=subfolder,
            commit_message=commit_message,
            create_pr=create_pr,
            token=token,
            **card,
        )

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


def _pairs(neurons: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
    for name, index in neurons.items():
        for neuron in index.tolist():
            yield name, neuron
