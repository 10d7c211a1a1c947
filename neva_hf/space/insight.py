"""What dials do and what they cost, and what a map's neurons are.

Everything but [`neuron`] is read from the map alone. [`neuron`] reads weights of the base model: on ZeroGPU, call it
where a GPU is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from neva_hf.errors import NeVAError
from neva_hf.identify.dose import expected
from neva_hf.map_files import natural_order
from neva_hf.module_edits import ModuleEdits
from neva_hf.projection import columns, layer_sizes
from neva_hf.strengths import unknown_value_message

from .engine import Engine
from .unembed import tokens_of

UNIT_KL = 0.05
"""What strength 1 of one dial costs, in nats per token: maps are calibrated to it."""

# Nats per token: no model moves so far, so a curve that says so is made up.
_ABSURD = 1000.0


@dataclass(frozen=True)
class Expected:
    """What dials are expected to do together: the sum of what each was measured to do alone, which is an estimate.

    Args:
        control (`dict[str, float]`): Dialled value -> shift of its margin, nats per token.
        others (`dict[str, float]`): Every other value -> shift of its margin.
        leakage (`float`, *optional*): 0.1 says that the others moved along a tenth as far as the dialled ones. `None`
            where nothing moves as it was dialled.
        kl (`float`): Damage: KL divergence from the base model on neutral text, nats per token.
        strength (`float`): The strength at which one dial alone costs as much.
        beyond (`tuple[str, ...]`): Values that are dialled beyond what was measured, where all of it may be more.
    """

    control: dict[str, float]
    others: dict[str, float]
    leakage: float | None
    kl: float
    strength: float
    beyond: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerNeurons:
    """The neurons of one value in one layer.

    Args:
        layer (`int`): The number of the layer.
        module (`str`): Its down projection.
        index (`list[int]`): The neurons, ascending.
        shift (`list[float]`): What strength 1 adds to each.
        gain (`list[float]`): Which multiple of its own activation strength 1 adds to each; 0 in a map without gains.
        size (`int`): How many neurons the layer has.
    """

    layer: int
    module: str
    index: list[int]
    shift: list[float]
    gain: list[float]
    size: int = 0


@dataclass(frozen=True)
class NeuronFacts:
    """One neuron.

    With gains, how much an edit writes depends on how active the neuron is, which a map does not hold. So its score
    compares gains as if all neurons were equally active: the length of what its shift writes and of what its gain
    writes, each as a share of the longest among the value's neurons, are added up.

    Args:
        module (`str`): Its down projection.
        layer (`int`): The number of the layer.
        index (`int`): Its number in the layer.
        shift (`dict[str, float]`): What strength 1 of each value that edits it adds to it.
        gain (`dict[str, float]`): Which multiple of its own activation that adds besides; 0 in a map without gains.
        score (`dict[str, float]`): How much both write to the residual stream, as a share of what the value's strongest
            neuron writes.
        rank (`dict[str, int]`): Its place among the value's neurons by that score; 1 is the strongest.
        promoted (`list[str]`): The tokens that it makes likelier when it is positive, most of all first.
        suppressed (`list[str]`): The tokens that it makes less likely then.
    """

    module: str
    layer: int
    index: int
    shift: dict[str, float]
    gain: dict[str, float]
    score: dict[str, float]
    rank: dict[str, int]
    promoted: list[str]
    suppressed: list[str]


def expected_of(engine: Engine, dials: Mapping[str, float]) -> Expected | None:
    """What the map's saved curves say of the current dials.

    Between dials, shifts and KL divergences are added up. Leakage is that of [`~neva_hf.identify.dose.leakage`] for one
    dial, and for several what all of them leak over what all of them reach, the dialled values left out.

    Args:
        engine ([`Engine`]): The page's model.
        dials (`dict[str, float]`): The dials.

    Returns:
        [`Expected`] or `None`: `None` where the map brings no sound curves.

    Raises:
        `NeVAError`: For dials that the engine would not take.
    """
    turned = engine.check(dials)
    dose: Any = engine.map.config.measurements.get("dose")
    try:
        found = {name: expected(dose, name, turned.get(name, 0.0)) for name in (turned or engine.values[:1])}
    except (NeVAError, AttributeError):
        return None
    seen = [name for name in engine.system.names if all(name in one.margins for one in found.values())]
    total = {name: sum(one.margins[name] for one in found.values()) for name in seen}
    signed = {name: math.copysign(1.0, turned.get(name, 1.0)) for name in found}
    others = [name for name in seen if name not in turned]
    reached = sum(signed[name] * one.margins.get(name, 0.0) for name, one in found.items())
    leaked = sum(max(0.0, signed[name] * one.margins[other]) for name, one in found.items() for other in others)
    kl = sum(one.kl for one in found.values())
    # (NaN is not smaller than anything)
    if not all(abs(number) < _ABSURD for number in (*total.values(), reached, leaked, kl)):
        return None
    measured = dose["strengths"]
    return Expected(
        control={name: total[name] for name in turned if name in total},
        others={name: total[name] for name in others},
        leakage=(leaked / len(others) / reached if others else 0.0) if reached > 0 else None,
        kl=max(kl, 0.0),
        strength=math.sqrt(max(kl, 0.0) / UNIT_KL),
        beyond=tuple(name for name, s in turned.items() if not min(*measured, 0) <= s <= max(*measured, 0)),
    )


def layers(engine: Engine, value: str) -> list[LayerNeurons]:
    """Where the neurons of a value are.

    Args:
        engine ([`Engine`]): The page's model.
        value (`str`): The value.

    Returns:
        `list[LayerNeurons]`: The layers that hold some, from the first to the last.

    Raises:
        `NeVAError`: If the map does not have the value.
    """
    row = _row(engine, value)
    found = []
    for position, module in enumerate(sorted(engine.map.modules, key=natural_order)):
        edits = engine.map.modules[module]
        touched = _touched(edits)[row]
        if not bool(touched.any()):
            continue
        order = edits.index[touched].argsort()
        index, unit = edits.index[touched][order].tolist(), _unit(engine, value)
        shift, gain = ((part[row][touched][order] * unit).tolist() for part in _parts(edits))
        size = layer_sizes(engine.base.get_submodule(module))[0]
        found.append(LayerNeurons(layer_number(module, position), module, index, shift, gain, size))
    return found


def overlap(engine: Engine) -> list[list[float]]:
    """How much the neurons of values have in common.

    Args:
        engine ([`Engine`]): The page's model.

    Returns:
        `list[list[float]]`: Rows and columns in the order of `engine.values`: neurons in both over neurons in either.
    """
    rows = [_row(engine, value) for value in engine.values]
    # Not by sets of neurons: a stranger's map may have a great many.
    both = torch.zeros(len(rows), len(rows))
    for edits in engine.map.modules.values():
        touched = _touched(edits)[rows].float()
        both += touched @ touched.T
    own = both.diagonal()
    either = own[:, None] + own[None, :] - both
    return (both / either.clamp(min=1)).tolist()


def neuron(engine: Engine, module: str, index: int, tokens: int = 10) -> NeuronFacts:
    """One neuron: how it is edited, how much that writes, and which tokens it speaks for.

    The tokens are read straight off its column of the down projection, scaled as the final norm scales, through the
    unembedding. That shows what a late layer writes well, and what an early one writes hardly.

    Args:
        engine ([`Engine`]): The page's model.
        module (`str`): A down projection that the map edits.
        index (`int`): One of its edited neurons.
        tokens (`int`): How many tokens on either side.

    Returns:
        [`NeuronFacts`]: Its tokens are plain text: escape them.

    Raises:
        `NeVAError`: If the map does not edit it.
    """
    edits = engine.map.modules.get(module)
    places = [] if edits is None else (edits.index == index).nonzero().flatten().tolist()
    if edits is None or not places:
        raise NeVAError("This map does not edit that neuron.")
    touched = _touched(edits)[:, places[0]]
    shift, gain, score, rank = {}, {}, {}, {}
    written = _written(engine)
    for value in engine.values:
        row = _row(engine, value)
        if not bool(touched[row]):
            continue
        shift[value], gain[value] = (float(part[row, places[0]]) * _unit(engine, value) for part in _parts(edits))
        own = written[module][row, places[0]]
        strongest = max(float(one[row].max()) for one in written.values())
        score[value] = float(own) / strongest if strongest > 0 else 0.0
        rank[value] = 1 + sum(int((one[row] > own).sum()) for one in written.values())
    column = columns(engine.base.get_submodule(module), torch.tensor([index]))[0]
    promoted, suppressed = tokens_of(engine.base, engine.tokenizer, module, column, tokens)
    position = sorted(engine.map.modules, key=natural_order).index(module)
    return NeuronFacts(module, layer_number(module, position), index, shift, gain, score, rank, promoted, suppressed)


def layer_number(module: str, otherwise: int = 0) -> int:
    """The number of the layer in a module's name.

    Example:

    ```py
    >>> from neva_hf.space.insight import layer_number
    >>> layer_number("model.layers.12.mlp.down_proj")
    12
    ```
    """
    found = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", module)
    return int(found[1]) if found else otherwise


_WRITTEN: WeakKeyDictionary[Engine, dict[str, torch.Tensor]] = WeakKeyDictionary()


def _written(engine: Engine) -> dict[str, torch.Tensor]:
    """Module -> how much each value writes through each neuron, `[V, k]`: see [`NeuronFacts`]. Made once per map."""
    found = _WRITTEN.get(engine)
    if found is None:
        both = {}
        for module, edits in engine.map.modules.items():
            lengths = columns(engine.base.get_submodule(module), edits.index).norm(dim=1).cpu()
            both[module] = torch.stack(_parts(edits)).abs() * lengths
        longest = torch.stack([one.amax(-1) for one in both.values()]).amax(0)[..., None]
        # (where a value has no gains, their part is 0 of 0)
        found = {module: torch.where(longest > 0, one / longest, 0.0).sum(0) for module, one in both.items()}
        _WRITTEN[engine] = found
    return found


def _parts(edits: ModuleEdits) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts and gains, `[V, k]` each."""
    return edits.shift, torch.zeros_like(edits.shift) if edits.gain is None else edits.gain


def _touched(edits: ModuleEdits) -> torch.Tensor:
    touched = edits.shift != 0
    return touched if edits.gain is None else touched | (edits.gain != 0)


def _row(engine: Engine, value: str) -> int:
    if value not in engine.map.values:
        raise NeVAError(unknown_value_message(value, engine.map.values))
    return engine.map.values.index(value)


def _unit(engine: Engine, value: str) -> float:
    units: Any = engine.map.config.units.get(value, (1.0, 1.0))
    return float(units[1])
