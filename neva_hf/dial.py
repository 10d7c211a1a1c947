"""Dialling the values of any model that holds NeVA layers, however they got in.

Strengths are set on a model (until changed), for a while, or for one call. For a while and for one call they belong to
the calling thread: two threads that share one model never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .config import NeVAConfig
from .edit import LayerEdit, check_multiple
from .errors import NeVAError
from .layer import NeVALayer
from .strengths import RowStrengths, Strengths, parse_strengths


def neva_layers(model: nn.Module) -> list[NeVALayer]:
    """The NeVA layers of a model, in the order of its modules.

    Args:
        model (`nn.Module`): Any module; without NeVA layers the list is empty.

    Returns:
        `list[NeVALayer]`: The layers.
    """
    return [module for module in model.modules() if isinstance(module, NeVALayer)]


def active_configs(model: nn.Module) -> dict[str, NeVAConfig]:
    """The configurations of a model's active adapters.

    Args:
        model (`nn.Module`): A model with NeVA layers.

    Returns:
        `dict[str, NeVAConfig]`: Adapter name -> configuration.

    Raises:
        `NeVAError`: If the model has no NeVA layer, or no active adapter.
    """
    return _configs(neva_layers(model))


def _configs(layers: Sequence[NeVALayer]) -> dict[str, NeVAConfig]:
    if not layers:
        raise NeVAError(
            "This model has no NeVA layers: load a neuron map first, for example with "
            "NeVAModel.from_pretrained(model, 'user/neva-...')."
        )
    found: dict[str, NeVAConfig] = {}
    for layer in layers:
        found |= {name: layer.neva_configs[name] for name in layer.active_adapters if name in layer.neva_configs}
    if not found:
        raise NeVAError("No NeVA adapter is active: choose one with model.set_adapter('default').")
    return found


def value_names(model: nn.Module) -> list[str]:
    """The values that can be dialled, of all active adapters together.

    Args:
        model (`nn.Module`): A model with NeVA layers.

    Returns:
        `list[str]`: Value names, each once.
    """
    return list(dict.fromkeys(name for config in active_configs(model).values() for name in config.values))


def tables_for(model: nn.Module, strengths: RowStrengths | None, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Checks strengths against the active adapters of a model.

    A value that several active adapters know is dialled in all of them.

    Args:
        model (`nn.Module`): A model with NeVA layers.
        strengths (`dict[str, float]`, `list[dict[str, float]]` or `None`): For all rows, or one dict per row.
        rows (`int`, *optional*): The rows of the batch, to be checked against a list.

    Returns:
        `dict[str, torch.Tensor]`: Adapter name -> strengths, float32 `[rows or 1, V]` on the CPU.

    Raises:
        `NeVAError`: See [`parse_strengths`].
    """
    layers = neva_layers(model)  # (once, since it walks through all modules)
    configs = _configs(layers)
    if any(layer.merged for layer in layers):
        raise NeVAError(
            "The edits are merged into the base model's weights, where strengths cannot change them: call "
            "model.unmerge_adapter() first."
        )
    names = list(dict.fromkeys(name for config in configs.values() for name in config.values))
    ranges = {name: pair for config in configs.values() for name, pair in config.ranges.items()}
    together = parse_strengths(strengths, names, rows=rows, ranges=ranges)
    columns = {name: position for position, name in enumerate(names)}
    return {
        adapter: together[:, [columns[name] for name in config.values]].contiguous()
        for adapter, config in configs.items()
    }


def set_strengths(model: nn.Module, strengths: Strengths | None = None, /, **by_name: float) -> None:
    """Sets the strengths of a model's values until they are set again.

    Args:
        model (`nn.Module`):
            A model with NeVA layers, from whatever loaded it: [`NeVAModel`], PEFT, or transformers'
            `model.load_adapter`.
        strengths (`dict[str, float]`, *optional*):
            Value -> strength. Values that are not named are put to 0; `{}` switches all edits off.
        by_name (`float`):
            The same as keywords.

    Raises:
        `NeVAError`: For unknown values and numbers that are not finite.

    Example:

    ```py
    >>> from neva_hf import set_strengths
    >>> set_strengths(model, benevolence=1.0, power=-0.5)  # doctest: +SKIP
    ```
    """
    given = joined(strengths, by_name)
    if not isinstance(given, Mapping):
        raise NeVAError(
            "Strengths that stay are one dict for all rows. For one dict per row pass them to the call: "
            "model.generate(..., strengths=[{...}, {...}])."
        )
    tables = tables_for(model, given)
    for layer in neva_layers(model):
        for adapter, table in tables.items():
            if adapter in layer.neva_strengths:
                layer.neva_strengths[adapter] = table[0].tolist()
        layer.refresh()


def get_strengths(model: nn.Module) -> dict[str, float]:
    """The strengths that are set on a model, without those of running calls.

    Args:
        model (`nn.Module`): A model with NeVA layers.

    Returns:
        `dict[str, float]`: Value -> strength, for every value of the active adapters.
    """
    found = dict.fromkeys(value_names(model), 0.0)
    for layer in neva_layers(model):
        for adapter in layer.active_adapters:
            if adapter in layer.neva_configs:
                found |= dict(zip(layer.neva_configs[adapter].values, layer.neva_strengths[adapter], strict=True))
    return found


@contextmanager
def dialled(
    model: nn.Module, strengths: RowStrengths | None, *, rows: int | None = None, gate: bool = True
) -> Iterator[None]:
    """Dials values for what the calling thread runs inside, in place of what is set on the model.

    Args:
        model (`nn.Module`): A model with NeVA layers.
        strengths (`dict[str, float]` or `list[dict[str, float]]`): For all rows, or one dict per row of the batch.
        rows (`int`, *optional*): The rows of the batch, to be checked against a list.
        gate (`bool`): Whether gates are used where the map has them.

    Raises:
        `NeVAError`: See [`parse_strengths`].

    Example:

    ```py
    >>> with dialled(model, {"hedonism": 2.0}):  # doctest: +SKIP
    ...     model.generate(**inputs)
    ```
    """
    tables = tables_for(model, strengths, rows)
    anything = any(bool(table.any()) for table in tables.values())
    edits: dict[NeVALayer, LayerEdit | None] = {
        layer: layer.make_edit(tables, use_gate=gate) if anything else None for layer in neva_layers(model)
    }
    before = {layer: (layer.call.running, layer.call.edit) for layer in edits}
    try:
        for layer, edit in edits.items():
            layer.call.running, layer.call.edit = True, edit
        yield
    finally:
        for layer, (running, edit) in before.items():
            layer.call.running, layer.call.edit = running, edit


def check_rows(model: nn.Module, rows: int | None) -> None:
    """Refuses a batch that cannot be divided among the rows of strengths that a context gave.

    Layers check this too, but those of models that flatten rows and tokens (OPT) cannot see it.

    Args:
        model (`nn.Module`): A model with NeVA layers.
        rows (`int`, *optional*): The rows of the batch.

    Raises:
        `NeVAError`: If they are no multiple of the rows of strengths.
    """
    if rows is None or torch.compiler.is_compiling():
        return
    layer = next((module for module in model.modules() if isinstance(module, NeVALayer)), None)
    if layer is not None and layer.call.edit is not None:
        check_multiple(rows, layer.call.edit.rows)


def joined(strengths: RowStrengths | None, by_name: Mapping[str, float]) -> RowStrengths:
    """Strengths given as a dict or list, and as keywords: one of the two.

    Raises:
        `NeVAError`: If both are given.
    """
    if strengths is not None and by_name:
        raise NeVAError(
            f"Give strengths as one dict or as keywords, not both (got a {type(strengths).__name__} and "
            f"{sorted(by_name)})."
        )
    return by_name if strengths is None else strengths


def batch_rows(*inputs: object) -> int | None:
    """The number of rows of the first tensor among a call's inputs, or `None` if there is none."""
    for given in inputs:
        if isinstance(given, torch.Tensor) and given.dim() >= 1:
            return int(given.shape[0])
    return None
