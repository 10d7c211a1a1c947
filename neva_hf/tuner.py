"""Puts NeVA layers into a model, and makes the method known to PEFT."""

from __future__ import annotations

import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from . import dial
from .architectures import check_base, find_down_projections, refuse_experts, warn_of_weights
from .config import NeVAConfig, NevaType
from .errors import NeVAError
from .layer import NeVALayer
from .module_edits import PREFIX, TENSORS, ModuleEdits, check_module
from .projection import is_plain
from .strengths import RowStrengths, Strengths


class NeVATuner(BaseTuner):
    """Edits the FFN neurons of a model, by strengths that are given at run time.

    PEFT makes it (`get_peft_model(base, NeVAConfig(...))`, `PeftModel.from_pretrained`); most people use [`NeVAModel`].
    `forward` and `generate` take `strengths`, one dict for all rows of the batch or one per row.

    Args:
        model (`nn.Module`): The base model.
        peft_config (`dict[str, NeVAConfig]`): Adapter name -> configuration.
        adapter_name (`str`): The adapter to put in.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from neva_hf import NeVAConfig
    >>> model = get_peft_model(base, NeVAConfig(values=["power"], neurons=16))  # doctest: +SKIP
    >>> model.generate(**inputs, strengths={"power": 1.0})  # doctest: +SKIP
    ```
    """

    prefix: str = "neva_"
    tuner_layer_cls = NeVALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's class attribute; found from the model

    def _prepare_adapter_config(self, peft_config: NeVAConfig, model_config: dict[str, Any]) -> NeVAConfig:
        # PEFT would look the model type up in a table; `_prepare_model` looks at the model.
        return peft_config

    def _prepare_model(self, peft_config: NeVAConfig, model: nn.Module) -> None:
        named = list(peft_config.neurons) if isinstance(peft_config.neurons, dict) else []
        check_base(model, peft_config.base, named)
        warn_of_weights(model, peft_config.base)
        if named and peft_config.target_modules is None:
            peft_config.target_modules = named
        if peft_config.target_modules is None:
            peft_config.target_modules = list(find_down_projections(model))
        if isinstance(peft_config.target_modules, str):
            # Names rather than the expression are saved, since expressions from files are not run. (Where none is
            # matched, PEFT says so.)
            pattern = re.compile(peft_config.target_modules)
            matched = [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]
            peft_config.target_modules = sorted(matched) or peft_config.target_modules

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NeVAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # The last place that all tensors pass which PEFT has read, before they are copied into the model.
        _check_tensors(model, config, state_dict)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )

    def _create_and_replace(
        self,
        peft_config: NeVAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, NeVALayer):
            target.update_layer(adapter_name, peft_config)
            return
        refuse_experts(target, current_key)
        # (PEFT's `_replace_module` would move the layer's tensors to the device of the weight, which has no numbers where
        # the base model is offloaded. They are where they belong already.)
        setattr(parent, target_name, NeVALayer(target, adapter_name, peft_config, module_name=current_key))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # A map that is loaded to be used leaves the base model's `requires_grad` alone: torch multiplies frozen weights
        # by other kernels, and at strength 0 every bit shall be the base model's.
        if not all(config.inference_mode for config in self.peft_config.values()):
            super()._mark_only_adapters_as_trainable(model)

    def forward(self, *args: Any, strengths: RowStrengths | None = None, gate: bool = True, **kwargs: Any) -> Any:
        with self._call(strengths, gate, *args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, strengths: RowStrengths | None = None, gate: bool = True, **kwargs: Any) -> Any:
        inputs = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        with self._call(strengths, gate, *args, *inputs):
            return self.model.generate(*args, **kwargs)

    def _call(self, strengths: RowStrengths | None, gate: bool, *inputs: Any) -> AbstractContextManager[None]:
        """What is in force during one call on the given inputs."""
        rows = dial.batch_rows(*inputs)
        if strengths is not None:
            return dial.dialled(self.model, strengths, rows=rows, gate=gate)
        if not gate:
            raise NeVAError("`gate=False` goes with strengths: pass strengths={...} in the same call.")
        dial.check_rows(self.model, rows)
        return nullcontext()

    def set_strengths(self, strengths: Strengths | None = None, /, **by_name: float) -> None:
        """See [`set_strengths`]."""
        dial.set_strengths(self.model, strengths, **by_name)

    def get_strengths(self) -> dict[str, float]:
        """See [`get_strengths`]."""
        return dial.get_strengths(self.model)

    def strengths(self, strengths: RowStrengths | None = None, /, *, gate: bool = True, **by_name: float) -> Any:
        """Dials values for what this thread runs inside the context; see [`dialled`]."""
        return dial.dialled(self.model, dial.joined(strengths, by_name), gate=gate)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        bases = [layer.base_layer for layer in dial.neva_layers(self.model) if is_plain(layer.base_layer)]
        if any(base.bias is None for base in bases):
            warnings.warn(
                "The base model's down projections have no bias; merging gives them one, in memory only: most "
                "architectures drop it when the merged model is saved and loaded again. To share an edited model, "
                "save the adapter.",
                UserWarning,
                stacklevel=3,
            )


def _check_tensors(model: nn.Module, config: NeVAConfig, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuses tensors that are no sound neuron map, or are not of the modules that the adapter is in."""
    widths = {layer.module_name: layer.in_features for layer in dial.neva_layers(model)}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".neva_")
        if module not in widths or kind not in TENSORS:
            raise NeVAError(f"The adapter's tensors hold {key!r:.120}, which is none of this neuron map's.")
        found.setdefault(module, {})[kind] = tensor
    for module, tensors in found.items():
        missing = [kind for kind in ("index", "shift") if kind not in tensors]
        if missing:
            raise NeVAError(f"The neuron map has no neva_{missing[0]} for {module!r}; it is damaged.")
        check_module(module, ModuleEdits(**tensors), config)
        last = int(tensors["index"].max())
        if last >= widths[module]:
            raise NeVAError(
                f"The map edits neuron {last} of {module!r}, which has only {widths[module]}: it was made for another "
                "model."
            )


# `register_peft_method` admits only members of PEFT's own enum, so its tables are filled here (and in config.py).
# Without this, that is without `import neva_hf`, PEFT answers a NeVA adapter with `KeyError: 'NEVA'`.
PEFT_TYPE_TO_TUNER_MAPPING[NevaType.NEVA] = NeVATuner
PEFT_TYPE_TO_PREFIX_MAPPING[NevaType.NEVA] = NeVATuner.prefix
