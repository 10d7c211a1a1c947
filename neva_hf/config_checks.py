"""What the fields of a neuron map's config are checked with. Every refusal names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import NeVAError
from .fingerprint import check_fingerprint

MAX_VALUES = 256
MAX_MODULES = 4096
MAX_NEURONS_PER_MODULE = 1 << 20
# All numbers of one kind (shifts, say) together: 1 GiB of float32.
MAX_NUMBERS = 1 << 28
# Beyond it float32 knows no finite logit that could be reached for.
MAX_GATE_PROBABILITY = 0.999999
MAX_SIZE = 1 << 31

# `gate` is a keyword of the calls that also take values by name, so no value may have that name.
RESERVED_NAMES = frozenset({"gate"})

_VALUE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}\Z")


def check_value_names(values: Any) -> list[str]:
    """Checks the value names of a map, in the order of its tensors' rows.

    Args:
        values (`list[str]`): Lower-case names such as `benevolence` or `self_direction`.

    Returns:
        `list[str]`: The same names, as a new list.

    Raises:
        `NeVAError`: For no names at all, more than 256, a name twice, or a name that is not snake_case.

    Example:

    ```py
    >>> from neva_hf.config import check_value_names
    >>> check_value_names(["benevolence", "power"])
    ['benevolence', 'power']
    ```
    """
    if isinstance(values, str) or not isinstance(values, (list, tuple)):
        raise NeVAError(f"`values` must be a list of names such as ['benevolence', 'power'], got {values!r:.80}.")
    if not 1 <= len(values) <= MAX_VALUES:
        raise NeVAError(f"`values` must hold 1 to {MAX_VALUES} names, got {len(values)}.")
    for name in values:
        if not isinstance(name, str) or not _VALUE_NAME.match(name) or name in RESERVED_NAMES:
            raise NeVAError(
                f"{name!r:.80} cannot be the name of a value: use lower-case letters, digits and underscores, at most "
                f"64, beginning with a letter (and not {sorted(RESERVED_NAMES)}), such as 'self_direction'."
            )
    repeated = sorted({name for name in values if values.count(name) > 1})
    if repeated:
        raise NeVAError(f"Each value may stand once in `values`, but these stand more often: {repeated}.")
    return list(values)


def is_number(number: Any, low: float, high: float) -> bool:
    """Whether something is a number, and between two others. (NaN is not.)"""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and low <= number <= high


def check_pairs(field_name: str, pairs: Any, values: list[str], low: float, high: float) -> dict[str, list[float]]:
    """Checks a mapping value -> [negative side, positive side]."""
    if not isinstance(pairs, Mapping):
        raise NeVAError(f"`{field_name}` must map values to two numbers, got {type(pairs).__name__}.")
    checked = {}
    for name, pair in pairs.items():
        if name not in values:
            raise NeVAError(f"`{field_name}` names {name!r:.80}, which is not one of this map's values {values}.")
        if not isinstance(pair, (list, tuple)) or [is_number(number, low, high) for number in pair] != [True, True]:
            raise NeVAError(
                f"`{field_name}[{name!r}]` must be two numbers between {low:g} and {high:g}, got {pair!r:.80}."
            )
        checked[name] = [float(number) for number in pair]
    return checked


def check_module_names(field_name: str, names: Any) -> list[str]:
    """Checks the names of a model's modules."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise NeVAError(f"`{field_name}` must hold names of modules, got {names!r:.80}.")
    if len(names) > MAX_MODULES:
        raise NeVAError(f"`{field_name}` names {len(names)} modules, and may name {MAX_MODULES}.")
    for name in names:
        check_module_name(field_name, name)
    return list(names)


def check_module_name(field_name: str, name: str) -> None:
    """Refuses what cannot be the name of a module of a model."""
    if not _MODULE_NAME.match(name):
        raise NeVAError(
            f"`{field_name}` names the module {name!r:.80}: names have letters, digits and the signs . _ -, at most 512."
        )


def check_counts(neurons: Any, values: int) -> int | dict[str, int]:
    """Checks how many neurons are edited: one number for all modules, or one for each."""
    counts = list(neurons.values()) if isinstance(neurons, Mapping) else [neurons]
    if isinstance(neurons, Mapping):
        if not neurons or not all(isinstance(name, str) and name for name in neurons):
            raise NeVAError(f"`neurons` must map names of modules to numbers, got {neurons!r:.80}.")
        check_module_names("neurons", list(neurons))
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_NEURONS_PER_MODULE:
            raise NeVAError(
                f"`neurons` must be a positive whole number or map module names to such numbers, got {count!r:.80}."
            )
    if sum(counts) * values > MAX_NUMBERS:
        raise NeVAError(
            f"`neurons` asks for {sum(counts)} neurons for each of {values} values, {sum(counts) * values} numbers; a "
            f"neuron map may have {MAX_NUMBERS}."
        )
    return dict(neurons) if isinstance(neurons, Mapping) else neurons


def check_base_facts(base: Mapping[str, Any]) -> None:
    """Checks what a map remembers of its base model, see [`~neva_hf.architectures.describe_base`]."""
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        size = base.get(key)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size < MAX_SIZE):
            raise NeVAError(f"`base[{key!r}]` must be a positive whole number, got {size!r:.80}.")
    for key in ("model_type", "hidden_act", "name", "revision"):
        text = base.get(key)
        if text is not None and (not isinstance(text, str) or len(text) > 512):
            raise NeVAError(f"`base[{key!r}]` must be a text of at most 512 characters, got {text!r:.80}.")
    check_fingerprint(base.get("fingerprint"))
