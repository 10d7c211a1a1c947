"""What a value system is made of: a value, its groups, and the plain data that they are read from.

Whatever comes from a user or a stranger's file is checked here. Every refusal names the field and says what was
expected, in a message that stays short whatever was given.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neva_hf.errors import NeVAError

MAX_VALUES = 256
MAX_FILE_BYTES = 2**20

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Value:
    """One value (or trait) that a model can be steered towards or away from. Misfitting fields raise a `NeVAError`.

    Args:
        name (`str`): What code calls it: a small letter, then at most 63 small letters, digits and `_`.
        label (`str`): What people read, e.g. `"Self-direction"`.
        definition (`str`): One or two sentences that say what living by it means.
        angle (`float`, *optional*): Its place on the circle in degrees, 0 <= angle < 360.

    Example:

    ```py
    >>> from neva_hf.values import Value
    >>> Value("thrift", "Thrift", "Spending little and wasting nothing.").label
    'Thrift'
    ```
    """

    name: str
    label: str
    definition: str
    angle: float | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_text("label", self.label)
        check_text("definition", self.definition)
        if self.angle is not None:
            number = isinstance(self.angle, (int, float)) and not isinstance(self.angle, bool)
            fits = number and 0 <= self.angle < 360  # NaN compares false
            check(fits, "angle", self.angle, "degrees as a number, 0 <= angle < 360, or no angle at all")
            object.__setattr__(self, "angle", float(self.angle))


def read_plain_data(path: Path) -> Any:
    """What a JSON or YAML file of at most 1 MiB holds, read so that no key is lost and no code is run."""
    suffix = path.suffix.lower()
    check(suffix in (".json", ".yaml", ".yml"), "the file's ending", suffix, ".json, .yaml or .yml")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        check_size(raw)
        text = raw.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique_keys) if suffix == ".json" else _load_yaml(text)
    except NeVAError:
        raise
    except json.JSONDecodeError as error:
        raise NeVAError(f"line {error.lineno} is not valid JSON: {error.msg} (column {error.colno})") from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, absurd numbers, nested too deeply
        raise NeVAError(f"cannot be read ({error}); expected a value system as {suffix[1:].upper()} text") from error


def write_plain_data(data: Any, path: Path) -> None:
    """Writes a JSON file that [`read_plain_data`] reads, or none at all."""
    raw = (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    check(path.suffix.lower() == ".json", "path", str(path), "a path that ends in .json")
    check_size(raw)
    path.write_bytes(raw)


def _load_yaml(text: str) -> Any:
    try:
        import yaml  # here only: nobody who keeps to JSON needs it
    except ImportError as error:
        raise NeVAError("reading YAML needs PyYAML: `pip install pyyaml`, or write the same as .json") from error

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            check_unique(f"the mapping at line {node.start_mark.line + 1}", [str(key.value) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the text"
        raise NeVAError(f"{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_unique("a JSON object", [key for key, _ in pairs])  # json itself would keep the last one silently
    return dict(pairs)


def read_values(entries: Any) -> tuple[Value, ...]:
    """Makes `Value`s from plain data; an entry that does not fit is named by its position."""
    values = []
    for position, item in enumerate(as_list("values", entries)):
        try:
            check_keys("the entry", item, ("name", "label", "definition"), ("angle",))
            values.append(Value(**item))
        except NeVAError as error:
            raise NeVAError(f"values[{position}]: {error}") from None
    return tuple(values)


def checked_values(values: Any) -> tuple[Value, ...]:
    """The values of a system, if they are `Value`s that fit together."""
    for value in as_list("values", values):
        check(isinstance(value, Value), "an entry of values", value, "a Value; from_dict takes plain data")
    if not 1 <= len(values) <= MAX_VALUES:
        raise NeVAError(f"values has {len(values)} entries; expected 1 to {MAX_VALUES}")
    check_unique("values", [value.name for value in values])
    bare = [value.name for value in values if value.angle is None]
    if 0 < len(bare) < len(values):
        raise NeVAError(f"angle is missing for {', '.join(bare)}; expected an angle for every value or for none")
    return tuple(values)


def checked_groups(given: Any, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Groups of known values, none of them empty."""
    groups = {}
    for group, listed in as_mapping("groups", given).items():
        check_name("a name in groups", group)
        members = groups[group] = as_list(f"groups.{group}", listed)
        if not members:
            raise NeVAError(f"groups.{group} is empty; expected at least one value, or no such group")
        for member in members:
            if member not in names:
                raise NeVAError(f"groups.{group}: value {unknown_name(member, names)}")
        check_unique(f"groups.{group}", members)
    return groups


def checked_opposites(given: Any, groups: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Which group competes with which, filled in so that it can be looked up from either side."""
    opposites = dict(as_mapping("opposite_groups", given))
    for group, other in tuple(opposites.items()):
        for name in (group, other):
            if name not in tuple(groups):
                raise NeVAError(f"opposite_groups: group {unknown_name(name, groups)}")
        if opposites.setdefault(other, group) != group:
            raise NeVAError(f"opposite_groups gives {other} more than one opposite; expected one group for each")
        if set(groups[group]) & set(groups[other]):
            raise NeVAError(f"opposite_groups: {group} and {other} share a value; expected none in common")
    return opposites


def check_keys(what: str, data: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for key in as_mapping(what, data):
        if key not in required + optional:
            raise NeVAError(f"key {unknown_name(key, required + optional)}")
    if missing := [key for key in required if key not in data]:
        raise NeVAError(f"key {missing[0]!r} is missing; expected {', '.join(required)}")


def check_name(what: str, name: Any) -> None:
    fits = isinstance(name, str) and _NAME.fullmatch(name) is not None
    check(fits, what, name, "a small letter, then at most 63 small letters, digits and _, like self_direction")


def check_text(what: str, text: Any) -> None:
    check(isinstance(text, str) and bool(text.strip()), what, text, "text that is not empty")


def check_size(raw: bytes) -> None:
    if len(raw) > MAX_FILE_BYTES:
        raise NeVAError(f"the file is larger than {MAX_FILE_BYTES} bytes (1 MiB), the limit; shorten the texts")


def check_unique(what: str, items: Iterable[str]) -> None:
    twice = [item for item, count in Counter(items).items() if count > 1]
    if twice:
        raise NeVAError(f"{what} has {_show(twice[0])} more than once; expected it once")


def as_list(what: str, items: Any) -> tuple[Any, ...]:
    check(isinstance(items, (list, tuple)), what, items, "a list")
    return tuple(items)


def as_mapping(what: str, items: Any) -> Mapping[Any, Any]:
    check(isinstance(items, Mapping), what, items, "a mapping of names")
    return items


def check(fits: bool, what: str, given: Any, expected: str) -> None:
    """Raises the one form of error for a field: what it is, what it was, what was expected."""
    if not fits:
        raise NeVAError(f"{what} is {_show(given)}; expected {expected}")


def unknown_name(name: Any, known: Iterable[str]) -> str:
    spelled = re.sub(r"[\s-]+", "_", name[:99].lower()) if isinstance(name, str) else ""  # finds Self-Direction too
    close = difflib.get_close_matches(spelled, list(known), 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{_show(name)} is unknown{hint}; expected one of {', '.join(known)}"


def _show(given: Any) -> str:
    # A file may hold any amount of anything: long texts are cut, containers named by their kind alone.
    shown = repr(given) if given is None or isinstance(given, (str, int, float)) else f"a {type(given).__name__}"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
