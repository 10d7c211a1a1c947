"""Values of several maps of one base model in one map.

Invariant: what the merged map does at any strengths is what the single maps do together at the same strengths, so their
units, ranges and measurements stay true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ._version import __version__
from .compare_maps import refuse_other_architecture
from .config import NeVAConfig, check_value_names
from .errors import NeVAError
from .fingerprint import verdict
from .map_files import natural_order
from .neuron_map import ModuleEdits, NeuronMap
from .strengths import unknown_value_message


def merge_maps(
    maps: Sequence[NeuronMap],
    *,
    renamed: Sequence[Mapping[str, str]] | None = None,
    sources: Sequence[str] | None = None,
) -> NeuronMap:
    """Puts the values of several maps of one base model into one map.

    Args:
        maps (`Sequence[NeuronMap]`): Two or more.
        renamed (`Sequence[Mapping[str, str]]`, *optional*): For each map, its value -> the name that it gets.
        sources (`Sequence[str]`, *optional*): What each map is called in the provenance of the merged one.

    Returns:
        [`NeuronMap`]: A new map, with the values in the order of the maps. Units, ranges, default strengths and what was
            measured per value go along; where each value comes from stands in `provenance["maps"]`.

    Raises:
        `NeVAError`: If the maps are not of the same base model, two values have the same name, or gates cannot be had
            together.

    Example:

    ```py
    >>> from neva_hf import NeuronMap
    >>> from neva_hf.merge_maps import merge_maps
    >>> both = [NeuronMap.from_pretrained(folder) for folder in ("a", "b")]  # doctest: +SKIP
    >>> merge_maps(both, renamed=[{"power": "power_a"}, {}]).save_pretrained("merged")  # doctest: +SKIP
    ```
    """
    maps = list(maps)
    if len(maps) < 2:
        raise NeVAError(f"Merging takes two neuron maps or more, got {len(maps)}.")
    names = list(sources) if sources is not None else [f"map {number}" for number in range(1, len(maps) + 1)]
    renames = [dict(one) for one in renamed] if renamed is not None else [{} for _ in maps]
    if len(names) != len(maps) or len(renames) != len(maps):
        raise NeVAError(f"There are {len(maps)} maps, but {len(names)} names and {len(renames)} sets of new names.")
    for number, other in enumerate(maps[1:], 1):
        _refuse_other_base(maps[0], other, names[0], names[number])
    new_names = [_new_names(one, new) for one, new in zip(maps, renames, strict=True)]
    _refuse_conflicts(new_names, names)
    values = check_value_names([new for one in new_names for new in one.values()])
    probability = _gate_probability(maps)
    use_gain = any(one.config.use_gain for one in maps)
    use_gate = any(one.config.use_gate for one in maps)
    modules = {
        name: _merged_module(
            [one.modules.get(name) for one in maps], [len(one.values) for one in maps], use_gain, use_gate
        )
        for name in sorted({name for one in maps for name in one.modules}, key=natural_order)
    }

    def per_value(field: str) -> dict[str, Any]:
        return {
            new[value]: pair
            for one, new in zip(maps, new_names, strict=True)
            for value, pair in getattr(one.config, field).items()
        }

    measurements, rest = _merged_measurements(maps, new_names)
    first = maps[0].config
    systems = [one.config.value_system for one in maps]
    same_system = all(system == systems[0] for system in systems) and not any(renames)
    config = NeVAConfig(
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision if all(one.config.revision == first.revision for one in maps) else None,
        values=values,
        use_gain=use_gain,
        use_gate=use_gate,
        gate_probability=probability,
        units=per_value("units"),
        ranges=per_value("ranges"),
        default_strengths=per_value("default_strengths"),
        value_system=systems[0] if same_system else None,
        base=next((one.config.base for one in maps if (one.config.base or {}).get("fingerprint")), first.base),
        provenance={
            "method": "merged",
            "maps": [
                {
                    "source": source,
                    "values": new,
                    "provenance": dict(one.config.provenance),
                    **({"measurements": left} if left else {}),
                    **(
                        {"value_system": one.config.value_system}
                        if one.config.value_system and not same_system
                        else {}
                    ),
                }
                for source, one, new, left in zip(names, maps, new_names, rest, strict=True)
            ],
            "versions": {"neva_hf": __version__},
        },
        measurements=measurements,
    )
    return NeuronMap(replace(config), modules)


def _refuse_other_base(a: NeuronMap, b: NeuronMap, name_a: str, name_b: str) -> None:
    refuse_other_architecture(a, b)
    bases = a.config.base or {}, b.config.base or {}
    found = verdict(bases[0].get("fingerprint"), bases[1].get("fingerprint"))
    called = a.base_model or "unnamed", b.base_model or "unnamed"
    if found in ("different", "unrelated"):
        raise NeVAError(
            f"{name_a} and {name_b} are for different base models ({called[0]:.120} and {called[1]:.120}): their weights "
            f"are {found}. Merge maps of one base model."
        )
    if found == "unknown" and a.base_model != b.base_model:
        raise NeVAError(
            f"{name_a} is for {called[0]:.120} and {name_b} for {called[1]:.120}, and at least one of them has no "
            "fingerprint that would tell whether these are the same weights. Merge maps of one base model."
        )


def _new_names(neuron_map: NeuronMap, renames: Mapping[str, str]) -> dict[str, str]:
    for value in renames:
        if value not in neuron_map.values:
            raise NeVAError(unknown_value_message(value, neuron_map.values))
    return {value: renames.get(value, value) for value in neuron_map.values}


def _refuse_conflicts(new_names: Sequence[Mapping[str, str]], sources: Sequence[str]) -> None:
    owners: dict[str, str] = {}
    for names, source in zip(new_names, sources, strict=True):
        for value, new in names.items():
            if new in owners:
                raise NeVAError(
                    f"{owners[new]:.120} and {source:.120} both have a value {new!r}. Give one of them another name, such "
                    f"as {source:.120}:{value}={new[:60]}_2."
                )
            owners[new] = source


def _gate_probability(maps: Sequence[NeuronMap]) -> float:
    gated = sorted({one.config.gate_probability for one in maps if one.config.use_gate})
    if len(gated) > 1:
        raise NeVAError(
            f"The maps' gates reach for different probabilities ({', '.join(f'{one:g}' for one in gated)}), and a map has "
            "one. Load these maps as two adapters instead."
        )
    # A value without a gate gets one that is always open, which takes a logit above 0.
    if gated == [0.5] and not all(one.config.use_gate for one in maps):
        raise NeVAError(
            "Gates with a probability of 0.5 cannot be had beside values without a gate. Load the maps as two adapters "
            "instead."
        )
    return gated[0] if gated else maps[0].config.gate_probability


def _merged_module(
    parts: Sequence[ModuleEdits | None], rows: Sequence[int], use_gain: bool, use_gate: bool
) -> ModuleEdits:
    """The edits of one module: all rows of all maps, over all neurons that one of them edits."""
    index = torch.cat([part.index for part in parts if part is not None]).unique()
    shape = (sum(rows), len(index))
    # (Weights and biases of 0 are a gate that is always open: its logit never reaches what is asked for, and the edit does
    # not move it, so all of the edit is used.)
    wide = {"shift": torch.zeros(shape)}
    wide |= {"gain": torch.zeros(shape)} if use_gain else {}
    wide |= {"gate_weight": torch.zeros(shape)} if use_gate else {}
    bias = torch.zeros(shape[0])
    start = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            place = torch.searchsorted(index, part.index)
            for kind, tensor in wide.items():
                own = getattr(part, kind)
                if own is not None:
                    tensor[start : start + count, place] = own
            if part.gate_bias is not None:
                bias[start : start + count] = part.gate_bias
        start += count
    return ModuleEdits(index=index.to(torch.int32), **wide, gate_bias=bias if use_gate else None)


def _merged_measurements(
    maps: Sequence[NeuronMap], new_names: Sequence[Mapping[str, str]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured per value, together; and for each map what was measured of it as a whole."""
    together: dict[str, Any] = {}
    rest: list[dict[str, Any]] = []
    for one, new in zip(maps, new_names, strict=True):
        left = dict(one.config.measurements)
        for key, found in one.config.measurements.items():
            if isinstance(found, Mapping) and found and found.keys() <= new.keys():
                together.setdefault(key, {}).update({new[value]: item for value, item in left.pop(key).items()})
        rest.append(left)
    doses = [left.get("dose") for left in rest]
    if all(isinstance(dose, Mapping) and isinstance(dose.get("curves"), Mapping) for dose in doses):
        heads = [{key: item for key, item in dose.items() if key != "curves"} for dose in doses]  # type: ignore[union-attr]
        # Curves over other strengths, or measured on other texts, do not stand in one table.
        if all(head == heads[0] for head in heads):
            curves = {
                new[value]: _renamed_curve(curve, value, new[value])
                for left, new in zip(rest, new_names, strict=True)
                for value, curve in left.pop("dose")["curves"].items()
                if value in new
            }
            together["dose"] = heads[0] | {"curves": curves}
    return together, rest


def _renamed_curve(curve: Any, value: str, new: str) -> Any:
    """A dose curve whose target is called by its new name; what is observed beside it keeps the scenarios' names."""
    margins = curve.get("margins") if isinstance(curve, Mapping) else None
    if value == new or not isinstance(margins, Mapping):
        return curve
    return {**curve, "margins": {new if seen == value else seen: shifts for seen, shifts in margins.items()}}
