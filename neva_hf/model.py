"""The model that people hold in their hands: a base model with a neuron map on it."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from peft import PeftModelForCausalLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from .architectures import check_base, refuse_experts
from .base import load_base
from .dial import get_strengths, neva_layers, set_strengths, value_names
from .errors import NeVAError
from .neuron_map import NeuronMap
from .projection import layer_sizes
from .strengths import RowStrengths, Strengths
from .tuner import NeVATuner

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class NeVAModel(PeftModelForCausalLM):
    """A causal language model whose values can be dialled.

    It is PEFT's model of a causal language model, so everything of PEFT works on it. `forward` and `generate` also take
    `strengths`, one dict for all rows of the batch or one per row, and `gate=False`.

    Example:

    ```py
    >>> from neva_hf import NeVAModel
    >>> model = NeVAModel.from_pretrained("user/neva-smollm2-135m-schwartz")  # doctest: +SKIP
    >>> model.set_strengths(benevolence=1.0, power=-0.5)  # doctest: +SKIP
    >>> inputs = model.tokenizer("What matters most?", return_tensors="pt")  # doctest: +SKIP
    >>> model.generate(**inputs, max_new_tokens=40)  # doctest: +SKIP
    >>> model.generate(**inputs, strengths={"power": 1.0})  # doctest: +SKIP
    ```
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer of the base model, where [`NeVAModel.from_pretrained`] loaded that itself."""

    base_model: NeVATuner

    @classmethod
    def from_pretrained(
        cls,
        base_or_map: nn.Module | str | os.PathLike[str],
        neuron_map: str | os.PathLike[str] | NeuronMap | None = None,
        adapter_name: str = "default",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **base_kwargs: Any,
    ) -> NeVAModel:
        """Loads a neuron map, and its base model unless that is given.

        Args:
            base_or_map (`nn.Module`, `str` or `os.PathLike`):
                A loaded base model, followed by the map; or the map alone, a folder or a Hub repository, whose config
                names the base model.
            neuron_map (`str`, `os.PathLike` or [`NeuronMap`], *optional*):
                The map, when the base model came first.
            adapter_name (`str`): The name that the adapter gets.
            revision (`str`, *optional*): Branch, tag or commit of the map's repository.
            subfolder (`str`, *optional*): Where in its folder or repository the map is.
            token (`str` or `bool`, *optional*): A Hub token.
            cache_dir (`str` or `os.PathLike`, *optional*): In place of the Hub's cache folder.
            local_files_only (`bool`): Whether to use the cache alone.
            base_kwargs (`Any`): For [`load_base`], such as `dtype` and `device`.

        Returns:
            [`NeVAModel`]: In evaluation mode. Its strengths are 0 unless the map's config says otherwise.

        Raises:
            `NeVAError`: If there is no such map, it is not sound, or it does not fit the base model.
        """
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        given = isinstance(base_or_map, nn.Module)
        source = neuron_map if given else base_or_map
        if given and source is None:
            raise NeVAError("A base model was given, but no neuron map: pass its folder or repository second.")
        if not given and neuron_map is not None:
            raise NeVAError(
                "To bring your own base model, pass the loaded model first (load_base(...) loads one), then the map."
            )
        if given and base_kwargs:
            raise NeVAError(f"{sorted(base_kwargs)} are for loading a base model, but one was given.")
        if not isinstance(source, NeuronMap):
            source = NeuronMap.from_pretrained(source, revision=revision, subfolder=subfolder, **hub)  # type: ignore[arg-type]
        if isinstance(base_or_map, nn.Module):
            return cls.from_map(base_or_map, source, adapter_name)
        if source.base_model is None:
            raise NeVAError(
                "The neuron map does not name its base model: load that first, and pass it before the map."
            )
        base, tokenizer = load_base(source.base_model, revision=source.config.revision, **hub, **base_kwargs)
        model = cls.from_map(base, source, adapter_name)
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_map(cls, base: nn.Module, neuron_map: NeuronMap, adapter_name: str = "default") -> NeVAModel:
        """Puts a neuron map on a base model.

        Args:
            base (`nn.Module`): The base model; it is changed in place.
            neuron_map ([`NeuronMap`]): The map.
            adapter_name (`str`): The name that the adapter gets.

        Returns:
            [`NeVAModel`]: The model.

        Raises:
            `NeVAError`: If the map does not fit the model.
        """
        if neva_layers(base):
            raise NeVAError(
                "This model has a neuron map on it already: add another with model.load_adapter(folder, 'other name'), or "
                "take it off with model.unload()."
            )
        # Before anything is put into the base model.
        check_base(base, neuron_map.config.base, list(neuron_map.modules))
        _check_indices(base, neuron_map)
        # (the layers' tensors are float32 already, which PEFT need not see to)
        model = cls(base, copy.deepcopy(neuron_map.config), adapter_name, autocast_adapter_dtype=False)
        # Rather than through PEFT, which walks through the whole model several times to find a handful of tensors.
        for layer in neva_layers(model):
            layer.fill(adapter_name, neuron_map.modules[layer.module_name])
        return model.eval()

    @property
    def values(self) -> list[str]:
        """The values that can be dialled."""
        return value_names(self)

    def set_strengths(self, strengths: Strengths | None = None, /, **by_name: float) -> None:
        """Sets strengths until they are set again. See [`set_strengths`].

        Args:
            strengths (`dict[str, float]`, *optional*): Value -> strength; values that are not named are put to 0.
            by_name (`float`): The same as keywords.
        """
        set_strengths(self, strengths, **by_name)

    def get_strengths(self) -> dict[str, float]:
        """The strengths that are set, value -> strength."""
        return get_strengths(self)

    def strengths(
        self, strengths: RowStrengths | None = None, /, *, gate: bool = True, **by_name: float
    ) -> AbstractContextManager[None]:
        """Dials values for what this thread runs inside the context. See [`dialled`].

        Args:
            strengths (`dict[str, float]` or `list[dict[str, float]]`, *optional*): For all rows, or one dict per row.
            gate (`bool`): Whether gates are used where the map has them.
            by_name (`float`): The same as keywords, for all rows.
        """
        return self.base_model.strengths(strengths, gate=gate, **by_name)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves the neuron map as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it is not there.
            kwargs (`Any`): As for [`~peft.PeftModel.save_pretrained`].
        """
        # "auto" would ask the Hub whether the vocabulary was resized; edits never touch embeddings.
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(str(save_directory), **kwargs)

    def push_to_hub(self, repo_id: str, *, adapter_name: str = "default", **kwargs: Any) -> CommitInfo:
        """Puts the neuron map on the Hub with its card. The base model stays where it is.

        Args:
            repo_id (`str`): The repository, such as `"user/neva-map"`; made if it is not there.
            adapter_name (`str`): Which of the model's maps.
            kwargs (`Any`): As for [`NeuronMap.push_to_hub`]: `private`, `revision`, `commit_message`, `create_pr`, `token`.

        Returns:
            `huggingface_hub.CommitInfo`: The commit, a `str` with its address.

        Raises:
            `NeVAError`: If it cannot be done; the repository is then as it was.
        """
        return NeuronMap.from_model(self, adapter_name).push_to_hub(repo_id, **kwargs)


def _check_indices(base: nn.Module, neuron_map: NeuronMap) -> None:
    for name, edits in neuron_map.modules.items():
        module = base.get_submodule(name)
        refuse_experts(module, name)
        d_ff, last = layer_sizes(module)[0], int(edits.index.max())
        if last >= d_ff:
            raise NeVAError(
                f"The map edits neuron {last} of {name!r}, which has only {d_ff}: it was made for another model."
            )
