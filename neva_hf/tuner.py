"""Puts NeVA layers into a model, and makes the method known to PEFT."""

from __future__ import annotations

import warnings
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from . import dial
from .architectures import check_base, find_down_projections, refuse_experts
from .config import NeVAConfig, NevaType
from .layer import NeVALayer
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
        if isinstance(peft_config.neurons, dict):
            check_base(model, peft_config.base, list(peft_config.neurons))
            if peft_config.target_modules is None:
                peft_config.target_modules = list(peft_config.neurons)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(find_down_projections(model))

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
        layer = NeVALayer(target, adapter_name, peft_config, module_name=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def forward(self, *args: Any, strengths: RowStrengths | None = None, gate: bool = True, **kwargs: Any) -> Any:
        if strengths is None:
            return self.model(*args, **kwargs)
        rows = dial.batch_rows(*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        with dial.dialled(self.model, strengths, rows=rows, gate=gate):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, strengths: RowStrengths | None = None, gate: bool = True, **kwargs: Any) -> Any:
        if strengths is None:
            return self.model.generate(*args, **kwargs)
        inputs = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        with dial.dialled(self.model, strengths, rows=dial.batch_rows(*args, *inputs), gate=gate):
            return self.model.generate(*args, **kwargs)

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
        if any(layer.get_base_layer().bias is None for layer in dial.neva_layers(self.model) if layer._is_plain()):
            warnings.warn(
                "The base model's down projections have no bias; merging gives them one, in memory only: most "
                "architectures drop it when the merged model is saved and loaded again. To share an edited model, "
                "save the adapter.",
                UserWarning,
                stacklevel=3,
            )


# `register_peft_method` admits only members of PEFT's own enum, so its tables are filled here (and in config.py).
# Without this, that is without `import neva_hf`, PEFT answers a NeVA adapter with `KeyError: 'NEVA'`.
PEFT_TYPE_TO_TUNER_MAPPING[NevaType.NEVA] = NeVATuner
PEFT_TYPE_TO_PREFIX_MAPPING[NevaType.NEVA] = NeVATuner.prefix
