"""What fixed strengths come to: per down projection a shift of its output, and factors of its weight's columns.

Invariant: the live model is only read. What an export is made of, or tried on, is a twin of the base model that shares
its tensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from neva_hf.dial import active_configs, get_strengths, neva_layers, tables_for
from neva_hf.errors import NeVAError
from neva_hf.projection import columns, layer_sizes
from neva_hf.strengths import Strengths, scale_by_units


@dataclass(frozen=True, eq=False)
class FixedEdit:
    """The edit of one down projection at fixed strengths.

    Args:
        shift (`torch.Tensor`): What is added to its output, float32 `[hidden]`.
        scale (`torch.Tensor`, *optional*): What the columns of its weight are multiplied with, one factor per neuron,
            float32 `[d_ff]`. `None` where all are 1.
    """

    shift: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def shifts(self) -> bool:
        """Whether anything is added at all."""
        return bool(self.shift.any())


def fixed_strengths(model: nn.Module, strengths: Strengths | None) -> dict[str, float]:
    """The strengths that an export freezes.

    Args:
        model (`nn.Module`): A model with NeVA layers.
        strengths (`dict[str, float]`, *optional*): Value -> strength. `None` takes those that are set on the model.

    Returns:
        `dict[str, float]`: Those that are not 0.

    Raises:
        `NeVAError`: If all are 0, or they are no strengths of this model's values.
    """
    if strengths is not None and not isinstance(strengths, Mapping):
        raise NeVAError(
            "An export has one set of strengths, a dict such as {'benevolence': 1.0}; got "
            f"{type(strengths).__name__}. Export once per set."
        )
    given = get_strengths(model) if strengths is None else dict(strengths)
    if strengths is not None:
        tables_for(model, given)  # checks them, and warns of those outside the fluent range
    kept = {name: float(strength) for name, strength in given.items() if strength != 0}
    if not kept:
        raise NeVAError(
            "All strengths are 0, so the export would be the base model. Give some that are not, such as "
            f"{{'{next(iter(active_configs(model).values())).values[0]}': 1.0}}."
        )
    return kept


def fixed_edits(model: nn.Module, strengths: Strengths) -> dict[str, FixedEdit]:
    """What the active adapters of a model do at these strengths.

    Args:
        model (`nn.Module`): A model with NeVA layers, which is not changed.
        strengths (`dict[str, float]`): Value -> strength.

    Returns:
        `dict[str, FixedEdit]`: Module name in the base model -> its edit, without modules that are left alone.

    Raises:
        `NeVAError`: If the map has gates, or nothing is edited at these strengths.

    Example:

    ```py
    >>> from neva_hf.export.fixed import fixed_edits
    >>> fixed_edits(model, {"power": 1.0})["model.layers.9.mlp.down_proj"].shift.shape  # doctest: +SKIP
    torch.Size([576])
    ```
    """
    with warned_already():
        tables = tables_for(model, strengths)
    found = {}
    for layer in neva_layers(model):
        shift = torch.zeros(layer.out_features)
        scale = torch.ones(layer.in_features)
        for name, table in tables.items():
            if name not in layer.neva_shift or not bool(table.any()):
                continue
            if name in layer.neva_gate_weight:
                raise NeVAError(
                    f"Adapter {name!r} has gates, which decide at every token how much of the edit is needed, so no "
                    "fixed numbers stand for it. Share the neuron map itself, or make one without gates."
                )
            config = layer.neva_configs[name]
            coefficients = scale_by_units(table, config.values, config.units)
            shift += (coefficients @ layer.fold(name).to("cpu", torch.float32))[0]
            if name in layer.neva_gain:
                gain = layer.tensor("gain", name).detach().to("cpu", torch.float32)
                index = layer.tensor("index", name).to("cpu", torch.int64)
                scale[index] += (coefficients @ gain)[0]
        scaled = bool((scale != 1).any())
        if bool(shift.any()) or scaled:
            found[layer.module_name] = FixedEdit(shift, scale if scaled else None)
    if not found:
        raise NeVAError(f"At the strengths {dict(strengths)} this map edits nothing, so there is nothing to export.")
    if not all(bool(torch.isfinite(edit.shift).all()) for edit in found.values()):
        raise NeVAError("At these strengths the edit is not finite. Use smaller ones; about 1 is the calibrated unit.")
    return found


def gain_factors(layer: nn.Module, edit: FixedEdit) -> tuple[torch.Tensor, torch.Tensor]:
    """The gains of an edit as a product of low rank, which is what a LoRA adapter holds.

    With `g` the gains at fixed strengths and `W` the weight of the down projection, what they add to its output is
    `W[:, index] @ diag(g) @ x[index]`: the first factor picks the neurons, the second is their columns times `g`.

    Args:
        layer (`nn.Module`): The down projection, without edits.
        edit ([`FixedEdit`]): Its edit.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Float32 `[k, d_ff]` of ones and zeros, and float32 `[hidden, k]`, both on the
        CPU, for the `k` neurons whose gain is not 0; `k` is 0 where the edit only shifts.

    Example:

    ```py
    >>> import torch
    >>> from neva_hf.export.fixed import FixedEdit, gain_factors
    >>> edit = FixedEdit(torch.zeros(2), torch.tensor([1.0, 1.5, 1.0]))
    >>> pick, write = gain_factors(torch.nn.Linear(3, 2), edit)
    >>> pick
    tensor([[0., 1., 0.]])
    >>> write.shape
    torch.Size([2, 1])
    ```
    """
    scale = torch.ones(layer_sizes(layer)[0]) if edit.scale is None else edit.scale
    index = (scale != 1).nonzero()[:, 0]
    pick = torch.zeros(len(index), len(scale))
    pick[torch.arange(len(index)), index] = 1
    if not len(index):
        return pick, torch.zeros(len(edit.shift), 0)
    write = columns(layer, index).to("cpu", torch.float32).T * (scale[index] - 1)
    return pick, write.contiguous()


def bare_twin(model: nn.Module) -> Any:
    """The base model under the NeVA layers, as modules of its own that share the tensors of the live one.

    It costs no memory to speak of. Replace tensors in it, never write into them.

    Args:
        model (`nn.Module`): A model with NeVA layers, which is not changed.

    Returns:
        [`~transformers.PreTrainedModel`]: The base model without adapters, in evaluation mode.

    Raises:
        `NeVAError`: If weights of it are offloaded, or merged with the edits, or it has adapters of another kind.
    """
    base = base_model(model)
    tensors = [*base.parameters(), *base.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise NeVAError(
            "Weights of this model are offloaded, and an export needs them all. Load the model on one device, such as "
            "device='cpu', to export."
        )
    if any(layer.merged for layer in neva_layers(base)):
        raise NeVAError("The edits are merged into the base model's weights: call model.unmerge_adapter() to export.")
    twin = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    for layer in neva_layers(twin):
        parent, _, name = layer.module_name.rpartition(".")
        setattr(twin.get_submodule(parent), name, layer.base_layer)
    others = [name for name, module in twin.named_modules() if hasattr(module, "base_layer")]
    if others:
        raise NeVAError(
            f"{others[0]!r} holds an adapter of another kind. Merge that into the base model first, save it, and load "
            "the neuron map on what was saved."
        )
    # What PEFT left on the model; transformers would save adapters alone because of it.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        twin.__dict__.pop(name, None)
    return twin.eval()


def base_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT's, NeVA layers and all; a model without PEFT's around it as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def warned_already() -> Iterator[None]:
    """Strengths outside their range are warned about when they are given, and not at every use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The strength ", category=UserWarning)
        yield
