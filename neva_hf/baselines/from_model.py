"""The neuron map itself as a method, so that it is measured by the very code that measures what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from neva_hf.dial import active_configs, dialled, value_names

from .method import Dials, Method


def from_model(model: nn.Module, name: str = "NeVA", *, gate: bool = True) -> Method:
    """A model's active neuron map as a [`Method`].

    Args:
        model (`nn.Module`): A model with NeVA layers.
        name (`str`): As in tables.
        gate (`bool`): Whether gates are used where the map has them.

    Returns:
        [`Method`]: In the strengths of the map, which are calibrated already. Its notes hold the map's units.

    Raises:
        `NeVAError`: If the model has no active neuron map.
    """

    @contextmanager
    def at(rows: Sequence[Dials]) -> Iterator[None]:
        with dialled(model, list(rows), gate=gate):
            yield

    units = {value: list(pair) for config in active_configs(model).values() for value, pair in config.units.items()}
    return Method(name, value_names(model), at, notes={"units": units})
