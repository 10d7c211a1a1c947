"""The small interface of everything that steers a model: a neuron map, or what people use instead.

A method is fitted once on a model (`Fit`), and then puts strengths in force for the rows of a batch. Its strengths are in
units of its own until they are calibrated: [`calibrated`] in calibrate.py scales them, per value and sign, so that +1 and
-1 cost the same KL divergence on neutral text for every method, which is how methods are compared at equal damage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neva_hf.measure import Progress, no_progress

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from neva_hf.scenarios import Scenario

    from .readings import Readings

Dials = Mapping[str, float]
"""Value -> strength, for one row of a batch."""

At = Callable[[Sequence[Dials]], AbstractContextManager[None]]
"""Puts dials in force while a model runs: one mapping per row of the batch, or a single one for all rows."""


def no_system(dials: Dials) -> str | None:
    """Of methods that leave the prompt alone."""
    return None


@dataclass(frozen=True)
class Method:
    """A way to steer one model, ready to use.

    Args:
        name (`str`): As in tables: `"CAA"`.
        values (`list[str]`): What it can dial.
        at (`Callable`): Puts dials in force, as a context manager; see `At`. `at([{}])` leaves the model as it is.
        system (`Callable[[Mapping[str, float]], str | None]`): The system prompt that goes with dials, for methods that
            work by the prompt; `None` for no change.
        scalable (`bool`): Whether strengths are numbers that more or less can be made of: not so for a prompt, which
            costs what it costs.
        notes (`dict[str, object]`): What was chosen while fitting, such as the layer; it goes into the report.
    """

    name: str
    values: list[str]
    at: At
    system: Callable[[Dials], str | None] = no_system
    scalable: bool = True
    notes: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What every method is fitted on: the same model, the same scenarios, the same contrast.

    Args:
        model (`nn.Module`): The base model, without adapters, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        values (`list[str]`): The values to steer.
        train (`Sequence[Scenario]`): What is learnt from.
        dev (`Sequence[Scenario]`): What choices such as a layer are made on.
        texts (`Sequence[str]`): Neutral texts for calibration.
        seed (`int`): For methods that draw.
        checkpoint (`Path`, *optional*): A file for the pass over the training scenarios, which goes on from it.
        progress ([`Progress`]): Shows how far passes and searches are.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    values: list[str]
    train: Sequence[Scenario]
    dev: Sequence[Scenario] = ()
    texts: Sequence[str] = ()
    seed: int = 0
    checkpoint: Path | None = None
    progress: Progress[Any] = no_progress

    @cached_property
    def readings(self) -> Readings:
        """What one pass over the training scenarios gives; made when first asked for, and shared by all methods."""
        from .evidence import read

        return read(self)


Fit = Callable[[Evidence], Method]
"""What makes a method: one function each."""
